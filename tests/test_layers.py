"""The house holds: modules import from rows below only, heavy packages wake on use, the front door is what it says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import open_gem

SOURCE = Path(open_gem.__file__).parent

# Top row first; a module may import from rows below its own. A folder counts as one module.
ROWS = [
    ["cli"],
    ["serve"],
    ["integrations"],
    ["export"],
    ["label"],
    ["save"],
    ["experiments", "report"],
    ["runs"],
    ["bench", "evaluate", "figures", "viz"],
    ["questions"],
    ["protocols"],
    ["trained"],
    ["localizer"],
    ["localization"],
    ["backbones", "datasets"],
    ["views"],
    ["method", "readout", "refine", "prompts", "imaging", "metrics"],
    ["methods"],
    ["clustering"],
    ["attention"],
    ["kernels"],
    ["parts"],
    ["images"],
    ["files", "numerics"],
    ["types", "errors", "checks", "paper"],
]
LEVEL = {module: len(ROWS) - row for row, modules in enumerate(ROWS) for module in modules}

# Packages that few modules may know.
OWNERS = {
    "open_clip": {"backbones", "prompts"},
    "timm": {"backbones"},
    "matplotlib": {"figures", "viz"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pyarrow": {"label", "parts"},
    "pycocotools": {"export", "parts"},
    "fsspec": {"label"},
    "ray": {"label", "serve"},
    "datasets": {"label"},
    "yaml": {"export", "label"},
    "filelock": {"label"},
    "scipy": {"clustering", "export", "metrics", "readout"},
    "supervision": {"export"},
    "rasterio": {"export"},
    "label_studio_sdk": {"export"},
    "fiftyone": {"export"},
    "cvat_sdk": {"integrations"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "prometheus_client": {"serve"},
    "uvicorn": {"cli"},
}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def house(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[str, ...]]:
    """Every imported module and name of a file, as dotted parts; the front door's TYPE_CHECKING block is its own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            base = tuple(node.module.split("."))
            found += [(*base, alias.name) for alias in node.names] if base == ("open_gem",) else [base]
    return found


@pytest.mark.parametrize("path", [p for p in sources() if p != SOURCE / "__init__.py"], ids=lambda p: p.name)
def test_imports_go_down(path):
    mine = house(path)
    assert mine in LEVEL, f"{mine} has no row in ROWS"
    for parts in imports(path):
        if parts[0] == "open_gem" and parts[1:] and parts[1] != mine:
            if parts[1] == "__version__":
                continue
            assert parts[1] in LEVEL, f"{path.name} imports {'.'.join(parts)} through the front door"
            assert LEVEL[parts[1]] < LEVEL[mine], f"{mine} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.name)
def test_heavy_packages_stay_with_their_owners(path):
    for parts in imports(path):
        owners = OWNERS.get(parts[0], {house(path)})
        assert house(path) in owners, f"{parts[0]} belongs to {owners}, not to {house(path)}"


def test_front_door():
    for name in open_gem.__all__:
        assert getattr(open_gem, name) is not None
    assert sorted(open_gem.__all__) == sorted(set(dir(open_gem)))
    with pytest.raises(AttributeError, match="nothing"):
        _ = open_gem.nothing


def test_import_is_light():
    code = "import sys, open_gem; print(any(m in sys.modules for m in ('torch', 'open_clip', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
