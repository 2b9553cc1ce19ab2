"""CONTRIBUTING.md keeps its word: one of each kind is added, in the files that it names and no others."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import open_gem

SOURCE = Path(open_gem.__file__).parent
GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")


def named_places(kind: str) -> set[str]:
    """The files of the package that the guide's paragraph on `kind` names; a folder stands for one new file in it."""
    [paragraph] = re.findall(rf"^\*\*{kind}\.\*\*(.*?)\n\n", GUIDE, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`src/open_gem/([a-z_/]+(?:\.py|/))`", paragraph))


class Copy:
    """A copy of the package that things are added to; `touched` are the files that changed."""

    def __init__(self, place: Path):
        self.place, self.touched = place, set[str]()
        weights = "towers/embedded/open_clip_model.safetensors"
        shutil.copytree(SOURCE, place / "open_gem", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        (place / "open_gem" / weights).symlink_to(SOURCE / weights)

    def new(self, file: str, text: str) -> None:
        path = self.place / "open_gem" / file
        assert not path.exists()
        path.write_text(text, "utf-8")
        self.touched.add(str(path.parent.relative_to(self.place / "open_gem")) + "/")

    def insert(self, file: str, after: str, text: str) -> None:
        path = self.place / "open_gem" / file
        old = path.read_text("utf-8")
        assert old.count(after) == 1, f"{after!r} is in {file} once"
        path.write_text(old.replace(after, after + text), "utf-8")
        self.touched.add(file)

    def python(self, code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.place)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def add_method(copy: Copy) -> str:
    row = (
        '\n    "halved": Method(Plain(lambda heads: heads.v / 2), depth=1, residual=False, about="half of the values"),'
    )
    copy.insert("method/table.py", "METHODS: dict[str, Method] = {", row)
    return "print(localizer.encode(image, ['halved'])['halved'].grid)"


def add_step(copy: Copy) -> str:
    step = """

@dataclass(frozen=True)
class Negate(Step):
    def __call__(self, features, context):
        return -features
"""
    copy.insert("method/steps.py", "        return scga(features, self.scale)\n", step)
    copy.insert("method/steps.py", 'STEPS: Mapping[str, Callable[[], Step]] = {"scga": Scga', ', "negate": Negate')
    return """
from open_gem.method.steps import find_step
from open_gem import METHODS
print(localizer.encode(image, METHODS["gem"].replace(steps=(find_step("negate"),))).grid)"""


def add_text_step(copy: Copy) -> str:
    step = """

@dataclass(frozen=True)
class Unchanged(TextStep):
    def adapt(self, text, patches, cosines):
        return text

    def mix(self, maps, cosines):
        return maps
"""
    copy.insert("method/text_steps.py", 'fcluster(tree, self.distance, "distance")).long()\n', step)
    copy.insert("method/text_steps.py", '{"cass": Cass', ', "unchanged": Unchanged')
    return "print(localizer.configured(text_step='unchanged')(image, 'a cat').size)"


def add_refinement(copy: Copy) -> str:
    copy.new(
        "refine/nothing.py",
        '''"""Nothing."""

from dataclasses import dataclass

from open_gem.refine import Refinement


@dataclass(frozen=True)
class Nothing(Refinement):
    def refine(self, image, localization):
        return localization
''',
    )
    copy.insert(
        "refine/__init__.py",
        '    "pamr": _pamr',
        ', "nothing": lambda: __import__("open_gem.refine.nothing", fromlist=["Nothing"]).Nothing()',
    )
    return """
from open_gem.refine import find_refinement
print(localizer.configured(refinement=find_refinement("nothing"))(image, "a cat").size)"""


def add_trained_model(copy: Copy) -> str:
    copy.new(
        "trained/mine.py",
        '''"""A model of my own."""

from open_gem.trained.clipseg import CLIPSeg


class Mine(CLIPSeg):
    template = "{}"
''',
    )
    row = """
    "mine": TrainedFamily("mine:Mine", "CLIPSegForImageSegmentation", "ViTImageProcessorPil", "clip"),"""
    copy.insert("towers/families.py", "LOCALIZING: Mapping[str, TrainedFamily] = {", row)
    return """
from open_gem.trained import registry
print(registry._reader(registry._find_spec("mine", "org/mine")).template)"""


def add_tower(copy: Copy) -> str:
    copy.new(
        "towers/mine.py",
        '''"""A vision transformer of my own."""

from open_gem.towers.native import NativeTower


class MyTower(NativeTower):
    reads = ("mine.VisionTransformer",)
''',
    )
    family = """
    ModelFamily("Mine", "open_clip", "^mine-", "mine:MyTower", (("mine-B-16", None),), "my own"),"""
    copy.insert("towers/families.py", "FAMILIES = (", family)
    return """
from open_gem.towers.families import find_family, towers
assert find_family("open_clip", "mine-B-16").name == "Mine"
print([tower.__name__ for tower in towers("open_clip")])"""


def add_data_set(copy: Copy) -> str:
    copy.new(
        "data/mine.py",
        '''"""Scenes of my own."""

from dataclasses import replace

from open_gem.data.scene_source import SCENES

MINE = replace(SCENES, name="mine")
''',
    )
    copy.insert(
        "data/__init__.py",
        "from open_gem.data.scene_source import SCENES, SceneSample, scenes, write_scenes\n",
        "from open_gem.data.mine import MINE\n",
    )
    copy.insert("data/__init__.py", "(*MAP_SOURCES, OPEN_IMAGES, SCENES", ", MINE")
    return "from open_gem.data import open_dataset; print(len(open_dataset('mine')))"


def add_export_format(copy: Copy) -> str:
    copy.new(
        "export/lines.py",
        '''"""A line an image."""


def write_lines(found, output):
    (output.folder / "lines.txt").write_text("".join(f"{image.id}\\\\n" for image in found), "utf-8")
''',
    )
    copy.insert(
        "export/__init__.py",
        "from open_gem.export.yolo import write_yolo\n",
        "from open_gem.export.lines import write_lines\n",
    )
    copy.insert(
        "export/__init__.py", "FORMATS: dict[str, Format] = {", '\n    "lines": Format("a line an image", write_lines),'
    )
    return "from open_gem.export import find_formats; print(find_formats(['lines']))"


def add_command(copy: Copy) -> str:
    copy.new(
        "cli/hello.py",
        '''"""`open-gem hello`."""

from open_gem.cli.app import app


@app.command()
def hello() -> None:
    """Say hello."""
    print("hello")
''',
    )
    copy.insert("cli/__init__.py", "from open_gem.cli import ground, ", "hello, ")
    return """
import sys
sys.argv = ["open-gem", "hello"]
from open_gem.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code"""


KINDS: dict[str, Callable[[Copy], str]] = {
    "Method on q, k and v": add_method,
    "Step after the attention": add_step,
    "Step on text": add_text_step,
    "Refinement": add_refinement,
    "Trained model": add_trained_model,
    "Tower": add_tower,
    "Data set": add_data_set,
    "Export format": add_export_format,
    "Command": add_command,
}
LOAD = """
import open_gem
from open_gem.data.scenes import scene
localizer, image = open_gem.load("embedded", device="cpu"), scene(0, size=128).image
"""


def test_the_guide_says_how_to_add_each_kind():
    assert re.findall(r"^\*\*(.+?)\.\*\*", GUIDE, re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_adding_one_touches_the_files_that_the_guide_names(kind, tmp_path):
    copy = Copy(tmp_path)
    use = KINDS[kind](copy)
    assert copy.python(LOAD + use if "localizer" in use else use).strip()
    assert copy.touched == named_places(kind)
