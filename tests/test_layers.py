"""The import rule: rooms import from rooms before theirs only, heavy packages load on use, the front door is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import open_gem

SOURCE = Path(open_gem.__file__).parent
CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")

RULE = re.search(r"```text\n(types, .+?)```", CONTRIBUTING, re.DOTALL)
assert RULE is not None, "CONTRIBUTING.md states the import rule"
ROWS = [[room.strip() for room in row.split(",")] for row in RULE[1].replace("\n", " ").split("→")]
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
SIBLINGS = {("evaluation", "data"), ("label", "data")}  # the one exception
ONLY_FOR = {"paper": {"cli"}}  # rooms that nobody else may import

# Packages that few rooms may know.
OWNERS = {
    "open_clip": {"towers", "text"},
    "timm": {"towers"},
    "transformers": {"towers", "trained"},
    "matplotlib": {"paper", "images"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pyarrow": {"label"},
    "pycocotools": {"export", "label", "rle", "objects"},
    "fsspec": {"label"},
    "ray": {"label", "serve"},
    "datasets": {"label"},
    "yaml": {"export", "label"},
    "filelock": {"label", "files"},
    "scipy": {"paper", "export", "label", "evaluation", "readout", "method"},
    "supervision": {"objects", "localization", "export"},
    "rasterio": {"export"},
    "label_studio_sdk": {"export"},
    "fiftyone": {"export"},
    "cvat_sdk": {"serve"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "prometheus_client": {"serve"},
    "uvicorn": {"cli"},
}
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[str, ...]]:
    """Every imported module and name of a file, as dotted parts."""
    names: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            base = tuple(node.module.split("."))
            names += [(*base, alias.name) for alias in node.names] if base == ("open_gem",) else [base]
    return names


def test_every_room_is_in_the_rule_and_on_the_map_and_no_other():
    rooms = {room_of(path) for path in FILES}
    assert rooms == LEVEL.keys()
    on_the_map = set(re.findall(r"^  ([a-z_]+)(?:\.py|/) ", CONTRIBUTING, re.MULTILINE))
    assert on_the_map == rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_from_rooms_before_it_only(path):
    mine = room_of(path)
    for package, *parts in imports(path):
        if package != "open_gem" or not parts or parts[0] in (mine, "__version__") or (mine, parts[0]) in SIBLINGS:
            continue
        assert parts[0] in LEVEL, f"{path.name} imports {'.'.join(parts)} through the front door"
        assert LEVEL[parts[0]] < LEVEL[mine], f"{mine} imports {parts[0]}, which does not come before it"
        assert mine in ONLY_FOR.get(parts[0], {mine}), f"{mine} imports {parts[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_heavy_packages_stay_with_their_owners(path):
    for package, *_ in imports(path):
        owners = OWNERS.get(package, {room_of(path)})
        assert room_of(path) in owners, f"{package} belongs to {owners}, not to {room_of(path)}"


def test_the_front_door_has_what_it_says():
    for name in open_gem.__all__:
        assert getattr(open_gem, name) is not None
    assert sorted(open_gem.__all__) == sorted(set(dir(open_gem)))
    with pytest.raises(AttributeError, match="nothing"):
        _ = open_gem.nothing


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("open_gem", ("torch", "open_clip", "numpy")), ("open_gem.images.read", ("torch", "scipy", "matplotlib"))],
)
def test_importing_is_light(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
