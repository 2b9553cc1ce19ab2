"""The command line as a person uses it: what is printed where, which files there are, and the exit code."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import open_gem
from open_gem import cli
from open_gem.cli import save
from open_gem.errors import WeightsError
from open_gem.images.draw import segmentation
from open_gem.localization import MIN_AREA, PRESENCE
from open_gem.method.guided import GUIDED
from open_gem.method.steps import find_step
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.towers.loading import DEFAULT_MODEL, FAMILIES
from open_gem.towers.native import NativeTower


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with an image of 60 × 80 (height × width)."""
    monkeypatch.chdir(tmp_path)
    random_image().save("cat.png")
    return tmp_path


def random_image(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def ground(tiny: str, *arguments: object) -> Result:
    return call("ground", "--model", tiny, "--device", "cpu", *arguments)


def files(folder: Path | str = "open_gem_out") -> set[str]:
    """Every file there, hidden ones included: nothing temporary may stay."""
    return {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()


def refused(result: Result, *words: str) -> None:
    """The request was wrong: one line says so, and nothing is written or printed."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
    assert not Path("open_gem_out").exists()


# Ground: what comes out -----------------------------------------------------------------------------------------------


def test_ground_writes_overlays_and_json_and_shows_a_table(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "a cat", "-p", "remote control")
    assert result.exit_code == 0, result.output
    assert files() == {"cat.a-cat.overlay.png", "cat.remote-control.overlay.png", "cat.json"}
    assert result.stderr == ""
    for word in ("cat.png", "a cat", "remote control", "open_gem_out"):
        assert word in result.stdout


def test_the_json_document_is_what_the_library_says(tiny: str, place: Path):
    ground(tiny, "cat.png", "-p", "a cat", "-p", "dog", "--threshold", "0.7", "--image-size", "square:48")
    document = json.loads(Path("open_gem_out/cat.json").read_text())
    localizer = open_gem.load(tiny, device="cpu", size="square:48")
    expected = localizer("cat.png", ["a cat", "dog"])

    assert document["path"] == "cat.png"
    assert document["size"] == {"height": 60, "width": 80}
    assert document["model"] == tiny
    assert document["size_rule"] == "square:48"
    assert document["threshold"] == 0.7
    settings = dict(document["method"])
    assert settings.pop("name") == "gem"
    assert settings == METHODS["gem"].describe()
    assert [entry["label"] for entry in document["labels"]] == ["a cat", "dog"]
    assert [entry["slug"] for entry in document["labels"]] == ["a-cat", "dog"]
    assert [entry["point"] for entry in document["labels"]] == expected.points().tolist()
    assert [entry["present"] for entry in document["labels"]] == list(expected.present())
    assert expected.scores is not None and expected.presence is not None
    assert [entry["score"] for entry in document["labels"]] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert [entry["presence"] for entry in document["labels"]] == pytest.approx(expected.presence.tolist(), abs=1e-5)
    assert document["objects"] == [obj.to_dict() for obj in expected.objects(0.7)]
    assert (document["presence"], document["min_area"], document["warnings"]) == (PRESENCE, MIN_AREA, [])


def test_absent_labels_look_absent(place: Path):
    from open_gem.data.scenes import scene

    Image.fromarray(scene(126, 512).image).save("scene.png")
    arguments = ("scene.png", "-p", "cat", "-p", "dog", "--json")
    result = ground("embedded", *arguments)
    [document] = map(json.loads, result.stdout.splitlines())
    assert [(entry["label"], entry["present"]) for entry in document["labels"]] == [("cat", True), ("dog", False)]
    assert {obj["label"] for obj in document["objects"]} == {"cat"}
    caution = open_gem.load("embedded", device="cpu").caution
    assert document["warnings"] == [caution] and result.stderr.count(str(caution)) == 1
    [cat], [dog] = ([line for line in result.stderr.splitlines() if f" {name} " in line] for name in ("cat", "dog"))
    assert "absent" in dog and "absent" not in cat
    saturation = [
        np.ptp(pixels(f"open_gem_out/scene.{name}.overlay.png").astype(int), axis=-1).mean() for name in ("cat", "dog")
    ]
    assert saturation[1] < 0.3 * saturation[0]

    everything = json.loads(ground("embedded", *arguments, "--presence", "0", "--save", "none").stdout)
    assert {obj["label"] for obj in everything["objects"]} == {"cat", "dog"}
    assert [entry["present"] for entry in everything["labels"]] == [True, True]
    large = json.loads(ground("embedded", *arguments, "--min-area", "0.9", "--save", "none").stdout)
    assert large["objects"] == []


@pytest.mark.parametrize("rule", [None, "presence", "denoise", "none"])
def test_a_rule_for_absent_labels_holds_for_every_file(place: Path, rule: str | None):
    from open_gem.data.scenes import scene

    Image.fromarray(scene(126, 512).image).save("scene.png")
    arguments = ["-p", "cat", "-p", "dog", "-p", "sheep", "--presence", "0.4", "--save", "mask,segmentation,json"]
    ground("embedded", "scene.png", *arguments, *([] if rule is None else ["--absent", rule]))
    document = json.loads(Path("open_gem_out/scene.json").read_text())
    result = open_gem.load("embedded", device="cpu").acknowledge()("scene.png", ["cat", "dog", "sheep"])

    drawn, kept = rule or "presence", rule or "none"
    assert document["absent"] == drawn
    assert [entry["present"] for entry in document["labels"]] == list(result.present(0.4, absent=drawn))
    assert document["objects"] == [obj.to_dict() for obj in result.objects(presence=0.4, absent=drawn)]
    for label, mask in zip(result.labels, result.masks(presence=0.4, absent=kept), strict=True):
        assert np.array_equal(pixels(f"open_gem_out/scene.{label}.mask.png") > 0, mask.numpy())
    labels = result.segment(presence=0.4, absent=kept)
    expected = segmentation(Image.open("scene.png").convert("RGB"), labels, result.labels)
    assert np.array_equal(pixels("open_gem_out/scene.segmentation.png"), np.asarray(expected))


def test_an_unknown_rule_for_absent_labels_ends_before_a_model_is_loaded(place: Path):
    refused(ground("no/such-model", "cat.png", "-p", "cat", "--absent", "maybe"), "absent is 'maybe'", "presence")


def test_defaults_of_the_command_line_are_those_of_the_library():
    from open_gem.cli.ground import FileOptions

    assert (FileOptions().presence, FileOptions().min_area) == (PRESENCE, MIN_AREA)


def test_every_kind_of_file_is_written(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "cat", "-p", "dog", "--save", "npz,overlay,heatmap, mask,segmentation,json")
    assert result.exit_code == 0, result.output
    singles = {f"cat.{slug}.{kind}.png" for slug in ("cat", "dog") for kind in ("overlay", "heatmap", "mask")}
    assert files() == singles | {"cat.segmentation.png", "cat.npz", "cat.json"}

    expected = open_gem.load(tiny, device="cpu")("cat.png", ["cat", "dog"])
    out = Path("open_gem_out")
    heatmap = pixels(out / "cat.dog.heatmap.png")
    assert (heatmap.shape, heatmap.min(), heatmap.max()) == ((60, 80), 0, 65535)
    assert abs(heatmap / 65535 - expected.heatmaps()["dog"].numpy()).max() < 1e-4
    mask = pixels(out / "cat.dog.mask.png")
    assert ((mask == 255) == expected.masks()["dog"].numpy()).all()
    assert set(np.unique(mask)) == {0, 255}
    with np.load(out / "cat.npz") as arrays:
        assert arrays["similarity"].dtype == np.float32
        assert np.allclose(arrays["similarity"], expected.similarity.numpy(), atol=1e-5)
        assert arrays["labels"].tolist() == arrays["prompts"].tolist() == ["cat", "dog"]
        assert arrays["size"].tolist() == [60, 80]
        assert arrays["scores"].shape == (2,)


def test_settings_reach_the_method(tiny: str, place: Path):
    changed = ["--method", "clearclip", "--depth", "2", "--iterations", "3", "--temperature-scale", "0.5"]
    result = ground(tiny, "cat.png", "-p", "cat", "--json", "--template", "{}", *changed)
    document = json.loads(result.stdout)
    settings = document["method"]
    given = {"name": "clearclip", "depth": 2, "iterations": 3, "temperature_scale": 0.5, "projections": "q"}
    assert {key: settings[key] for key in given} == given
    assert document["template"] == "{}"
    plain = json.loads(ground(tiny, "cat.png", "-p", "cat", "--json").stdout)
    assert document["labels"] != plain["labels"]


def test_background_reaches_the_segmentation(tiny: str, place: Path):
    drawn = []
    for background in ("0", "1"):
        arguments = ("-p", "cat", "-p", "dog", "--save", "segmentation", "--background", background)
        assert ground(tiny, "cat.png", *arguments).exit_code == 0
        with Image.open("open_gem_out/cat.segmentation.png") as segmentation:
            drawn.append(segmentation.height)
    assert drawn[0] > drawn[1]  # all background has no legend


def test_json_lines_alone_on_stdout(tiny: str, place: Path):
    random_image(seed=1).save("dog.png")
    result = ground(tiny, "cat.png", "missing.png", "dog.png", "-p", "кот", "--json", "--save", "none")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["path"] for document in documents] == ["cat.png", "missing.png", "dog.png"]
    assert ["error" in document for document in documents] == [False, True, False]
    assert "error: 'missing.png' does not exist\n" in result.stderr
    assert "кот" in result.stderr  # the table
    assert result.exit_code == 1
    assert not Path("open_gem_out").exists()


def test_quiet_prints_nothing(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "cat", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert "cat.json" in files()


def test_a_bar_on_a_terminal_leaves_stdout_alone(tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a stream for a terminal
    result = ground(tiny, "cat.png", "cat.png", "-p", "cat", "--json")
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 2
    assert "2/2" in result.stderr
    for arguments in (["cat.png", "cat.png", "--quiet"], ["cat.png"]):
        assert "1/" not in ground(tiny, *arguments, "-p", "cat", "--json").stderr


def test_prompts_come_from_a_file(tiny: str, place: Path):
    Path("prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  кот  \n".encode())
    result = ground(tiny, "cat.png", "-p", "dog", "-p", "@prompts.txt", "--json")
    assert [entry["label"] for entry in json.loads(result.stdout)["labels"]] == ["dog", "a cat", "кот"]


def test_same_names_do_not_overwrite_each_other(tiny: str, place: Path):
    for index, folder in enumerate(("a", "b")):
        Path(folder).mkdir()
        random_image(seed=index).save(f"{folder}/cat.png")
    random_image(seed=2).save("Cat.jpg")
    result = ground(tiny, "a/cat.png", "b/cat.png", "Cat.jpg", "-p", "x", "-p", "x", "-p", "X!")
    assert result.exit_code == 0, result.output
    documents = [json.loads(Path(f"open_gem_out/{stem}.json").read_text()) for stem in ("cat", "cat-2", "Cat-3")]
    assert [document["path"] for document in documents] == ["a/cat.png", "b/cat.png", "Cat.jpg"]
    assert len([name for name in files() if name.endswith(".overlay.png")]) == 9


def test_running_again_gives_the_same_files(tiny: str, place: Path):
    arguments = ("cat.png", "-p", "cat", "--save", "overlay,heatmap,mask,segmentation,json")
    first, second = (
        (ground(tiny, *arguments), {name: Path("open_gem_out", name).read_bytes() for name in files()})[1]
        for _ in range(2)
    )
    assert first == second
    assert len(first) == 5


def test_files_have_the_usual_permissions(tiny: str, place: Path):
    ground(tiny, "cat.png", "-p", "cat")
    Path("plain").touch()
    assert Path("open_gem_out/cat.json").stat().st_mode == Path("plain").stat().st_mode


def test_thousands_of_prompts(tiny: str, place: Path):
    random_image(16, 16).save("small.png")
    Path("many.txt").write_text("\n".join(f"thing {index}" for index in range(2000)))
    result = ground(tiny, "small.png", "-p", "@many.txt")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: 2000 labels: overlays of the 20 with the highest scores only")
    prompts = json.loads(Path("open_gem_out/small.json").read_text())["labels"]
    assert len(prompts) == 2000
    best = sorted(prompts, key=lambda entry: -entry["score"])[:20]
    assert files() == {"small.json"} | {f"small.{entry['slug']}.overlay.png" for entry in best}
    assert len(result.stdout.splitlines()) < 40


def test_more_than_twenty_overlays_if_overlays_are_asked_for(tiny: str, place: Path):
    phrases = [word for index in range(21) for word in ("-p", f"thing {index}")]
    result = ground(tiny, "cat.png", *phrases, "--save", "overlay")
    assert result.stderr == ""
    assert len(files()) == 21


def test_a_prompt_that_is_too_long_is_one_line_of_warning(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "very " * 60 + "long cat")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: prompt ")
    assert result.stderr.count("\n") == 1
    assert ".py" not in result.stderr
    assert max(map(len, files())) < 80


def test_prompts_in_any_script(tiny: str, place: Path):
    phrases = ["😀", "猫", "кот", "../../etc/passwd", "a\\b:c*?", "[red]cat[/red]", "ﬁancé", "-dash", "a\nb"]
    arguments = [f"--prompt={phrase}" for phrase in phrases]
    result = ground(tiny, "cat.png", *arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(Path("open_gem_out/cat.json").read_text("utf-8"))
    assert [entry["label"] for entry in document["labels"]] == phrases
    names = {f"cat.{entry['slug']}.overlay.png" for entry in document["labels"]}
    assert files() == names | {"cat.json"}
    assert all(name.isascii() and name.replace(".", "").replace("-", "").isalnum() for name in names)
    assert "[red]cat[/red]" in result.stdout


# Ground: what goes wrong ----------------------------------------------------------------------------------------------


def cut_jpeg() -> bytes:
    data = io.BytesIO()
    random_image().save(data, "JPEG")
    return data.getvalue()[:-800]


def png(height: int, width: int) -> bytes:
    data = io.BytesIO()
    random_image(height, width).save(data, "PNG")
    return data.getvalue()


BAD_IMAGES = {
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, I am text\n", "not an image"),
    "cut.jpg": (cut_jpeg(), "truncated"),
    "dot.png": (png(1, 1), "smaller than one 8x8 patch"),
    "missing.png": (None, "does not exist"),
    "folder": ("folder", "is a directory"),
}


def make_bad(name: str) -> None:
    content = BAD_IMAGES[name][0]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content == "folder":
        Path(name).mkdir()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_one_line_and_the_others_are_done(name: str, tiny: str, place: Path):
    make_bad(name)
    random_image(seed=1).save("dog.png")
    result = ground(tiny, "cat.png", name, "dog.png", "-p", "x")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"error: '{name}'")
    assert BAD_IMAGES[name][1] in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.count(name) == 1
    assert files() == {"cat.x.overlay.png", "cat.json", "dog.x.overlay.png", "dog.json"}


def test_only_bad_images_write_nothing(tiny: str, place: Path):
    for name in BAD_IMAGES:
        make_bad(name)
    result = ground(tiny, *BAD_IMAGES, "-p", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == len(BAD_IMAGES)
    assert not Path("open_gem_out").exists()


BAD_REQUESTS = {
    "no phrase": (["--json"], "no prompt given"),
    "empty phrase": (["-p", "cat", "-p", "  "], "prompt 1 is empty"),
    "phrase not UTF-8": (["-p", "a\udcff"], "not UTF-8"),
    "no phrase file": (["-p", "@nowhere.txt"], "cannot read prompts from 'nowhere.txt'"),
    "phrase file is a picture": (["-p", "@cat.png"], "not UTF-8"),
    "unknown method": (["-p", "x", "--method", "gemm"], "did you mean gem?"),
    "size rule": (["-p", "x", "--image-size", "huge"], "'huge'"),
    "no size rule": (["-p", "x", "--image-size", ""], "size rule"),
    "depth 0": (["-p", "x", "--depth", "0"], "depth is 0"),
    "depth beyond the blocks": (["-p", "x", "--depth", "7"], "depth 7, but the model has 6 blocks"),
    "negative iterations": (["-p", "x", "--iterations", "-1"], "iterations is -1"),
    "temperature scale 0": (["-p", "x", "--temperature-scale", "0"], "temperature_scale is 0"),
    "temperature scale negative": (["-p", "x", "--temperature-scale", "-2"], "temperature_scale is -2"),
    "temperature scale nan": (["-p", "x", "--temperature-scale", "nan"], "temperature_scale is nan"),
    "template": (["-p", "x", "--template", "a photo"], "template is 'a photo'"),
    "threshold": (["-p", "x", "--threshold", "1.5"], "threshold is 1.5"),
    "threshold nan": (["-p", "x", "--threshold", "nan"], "threshold is nan"),
    "background": (["-p", "x", "--background", "-0.1"], "background is -0.1"),
    "what to save": (["-p", "x", "--save", "overlay,jpeg"], "'jpeg'"),
    "nothing to save": (["-p", "x", "--save", ""], "or none"),
    "device": (["-p", "x", "--device", "abacus"], "abacus"),
    "tag of a folder": (["-p", "x", "--pretrained", "openai"], "'openai'"),
    "unknown model": (["-p", "x", "--model", "ViT-B-61"], "unknown model 'ViT-B-61'"),
    "unknown tag": (["-p", "x", "--model", "ViT-B-16", "--pretrained", "nope"], "'nope' is no tag"),
    "no tag": (["-p", "x", "--model", "ViT-B-16"], "needs a pretrained tag"),
    "no such folder": (["-p", "x", "--model", "local-dir:nowhere"], "no such folder"),
    "output is a file": (["-p", "x", "--out", "cat.png"], "cannot write to 'cat.png'"),
    "output below a file": (["-p", "x", "--out", "cat.png/deep/er"], "cannot write to 'cat.png/deep/er'"),
    "output with too long a name": (["-p", "x", "--out", "x" * 300], "cannot write to"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_one_line_and_writes_nothing(case: str, tiny: str, place: Path):
    arguments, words = BAD_REQUESTS[case]
    before = files(place)
    refused(ground(tiny, "cat.png", *arguments), words)
    assert files(place) == before


@pytest.mark.parametrize("case", ["output is a file", "size rule", "depth 0", "empty phrase", "threshold", "template"])
def test_requests_are_checked_before_the_model_is_loaded(case: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **keywords: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("open_gem.towers.load", load)
    arguments, words = BAD_REQUESTS[case]
    refused(call("ground", "cat.png", *arguments), words)


def test_an_output_folder_without_permission(place: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(*arguments: object, **keywords: object) -> None:  # simulated, because root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    refused(call("ground", "cat.png", "-p", "x"), "cannot write to 'open_gem_out': Permission denied")


@pytest.mark.parametrize("arguments", [[], ["cat.png", "--depth", "many"], ["cat.png", "--no-such-option"]])
def test_usage_errors_exit_with_2(arguments: list[str], place: Path):
    result = call("ground", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert result.stdout == ""


def test_weights_that_do_not_load_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **keywords: object) -> None:
        raise WeightsError("two\nlines")

    monkeypatch.setattr("open_gem.towers.load", load)
    refused(call("ground", "cat.png", "-p", "x"), "error: two lines")


def test_unexpected_errors_are_not_hidden(tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save.ImageResult, "rows", lambda *_: 1 / 0)
    assert isinstance(ground(tiny, "cat.png", "-p", "x").exception, ZeroDivisionError)


def test_ctrl_c_exits_with_130_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("open_gem.towers.load", load)
    result = call("ground", "cat.png", "-p", "x")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert files(place) == {"cat.png"}


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_ever_half_written(trouble: BaseException, tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    ground(tiny, "cat.png", "-p", "x")
    before = {name: Path("open_gem_out", name).read_bytes() for name in files()}

    def save(self: Image.Image, file: io.BytesIO, format: str) -> None:
        file.write(b"half")
        raise trouble

    monkeypatch.setattr(Image.Image, "save", save)
    result = ground(tiny, "cat.png", "-p", "x", "--threshold", "0.9")
    assert result.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 2)
    assert {name: Path("open_gem_out", name).read_bytes() for name in files()} == before
    if isinstance(trouble, OSError):
        assert result.stderr == "error: cannot write 'open_gem_out/cat.x.overlay.png': No space left on device\n"


# Demo -----------------------------------------------------------------------------------------------------------------


def test_the_demo_writes_what_it_located(tiny: str, place: Path):
    from open_gem.data.scenes import scene

    result = call("demo", "--model", tiny, "--device", "cpu", "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(Path("open_gem_demo/result.json").read_text())
    made = scene(3, size=512)
    *present, absent = document["labels"]
    assert tuple(entry["label"] for entry in present) == made.names
    assert absent["label"] not in made.names
    assert absent["point_in_object"] is None
    for entry, mask, box in zip(present, made.masks, made.boxes, strict=True):
        x, y = entry["point"]
        assert entry["point_in_object"] == mask[y, x]
        assert entry["object_box"] == box.tolist()
    overlays = {f"scene.{entry['slug']}.overlay.png" for entry in document["labels"]}
    assert files("open_gem_demo") == overlays | {"scene.png", "demo.png", "result.json"}
    assert (pixels("open_gem_demo/scene.png") == made.image).all()
    for word in (*made.names, "not in the image", "demo.png"):
        assert word in result.stderr


def test_the_demo_finds_what_its_scene_has_by_gem(place: Path):
    result = call("demo", "--device", "cpu", "--json")
    document = json.loads(result.stdout)
    assert document["method"]["name"] == "gem"
    assert [entry["point_in_object"] for entry in document["labels"]] == [True, True, None]
    assert [entry["present"] for entry in document["labels"]] == [True, True, False]
    assert len(document["objects"]) == 2


def test_the_gallery_is_a_page_whose_pictures_are_there(tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("open_gem.cli.demo.SEEDS", (126,))
    result = call("demo", "--model", tiny, "--device", "cpu", "--gallery", "--out", "gallery")
    assert result.exit_code == 0, result.output
    assert "gallery.md" in result.stdout
    page = Path("gallery/gallery.md").read_text()
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert files("gallery") == {"gallery.md", *pictures} == {
        "gallery.md", "methods-126.png", "maps-126.png"
    }  # fmt: skip
    assert tiny in page and "cat, sheep" in page


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--model", "nope"], ["--out", "cat.png"]])
def test_demo_refuses(arguments: list[str], tiny: str, place: Path):
    result = call("demo", "--model", tiny, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert files(place) == {"cat.png"}


# Ground: several methods, labels of several phrases, views -----------------------------------------------------------


def test_methods_are_compared_side_by_side(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "a cat", "-p", "dog", "--method", "gem,clip_surgery,clip")
    assert result.exit_code == 0, result.output
    assert files() == {"gem", "clip_surgery", "clip", "cat.compare.png"}
    for name in ("gem", "clip_surgery", "clip"):
        assert files(f"open_gem_out/{name}") == {"cat.a-cat.overlay.png", "cat.dog.overlay.png", "cat.json"}
        document = json.loads(Path(f"open_gem_out/{name}/cat.json").read_text())
        assert document["method"]["name"] == name
        assert document["method"]["depth"] == METHODS[name].depth
        alone = open_gem.load(tiny, device="cpu", method=name)("cat.png", ["a cat", "dog"])
        assert [entry["point"] for entry in document["labels"]] == alone.points().tolist()
        assert f"cat.png · {name}" in result.stdout
    with Image.open("open_gem_out/cat.compare.png") as sheet:
        assert sheet.width > 4 * 340 and 2 * 255 < sheet.height < 3 * 255  # the image and three methods; two labels


def test_one_json_document_per_image_and_method(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "missing.png", "-p", "cat", "--method", "all", "--json", "-q", "--save", "none")
    assert result.exit_code == 1
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["method"]["name"] for document in documents[:-1]] == list(METHODS)
    assert documents[-1].keys() == {"path", "error"}
    assert not Path("open_gem_out").exists()


def test_the_document_has_the_presence(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "a cat", "--json", "-q", "--save", "none")
    [entry] = json.loads(result.stdout)["labels"]
    found = open_gem.load(tiny, device="cpu")("cat.png", "a cat")
    assert found.presence is not None
    assert entry["presence"] == pytest.approx(found.presence.item(), abs=1e-5)


def test_classes_come_from_a_file_with_synonyms_and_background(tiny: str, place: Path):
    Path("classes.txt").write_text("sky, wall\ncat, kitten\ndog\n")
    arguments = ("--classes", "classes.txt", "--first-is-background", "--save", "npz,json", "--negative", "fence")
    result = ground(tiny, "cat.png", *arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(Path("open_gem_out/cat.json").read_text())
    assert [entry["label"] for entry in document["labels"]] == ["cat", "dog"]
    assert document["scale"] == "probability"  # so that the background and negatives count
    with np.load("open_gem_out/cat.npz") as arrays:
        assert arrays["labels"].tolist() == ["cat", "dog"]
        assert arrays["prompts"].tolist() == ["cat", "kitten", "dog", "sky", "wall", "fence"]
        assert arrays["similarity"].shape[0] == 6
    plain = ground(tiny, "cat.png", "--classes", "classes.txt", "--json", "-q", "--save", "none")
    assert [entry["label"] for entry in json.loads(plain.stdout)["labels"]] == ["sky", "cat", "dog"]


def test_classes_come_from_a_yaml_file_whose_thresholds_are_for_labelling(tiny: str, place: Path):
    Path("classes.yaml").write_text("labels: {cat: [cat, kitten], dog: }\nbackground: [sky]\npresence: 0.8\n")
    result = ground(tiny, "cat.png", "-c", "classes.yaml", "--save", "npz", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == "warning: the thresholds in 'classes.yaml' are for open-gem label only\n"
    with np.load("open_gem_out/cat.npz") as arrays:
        assert arrays["labels"].tolist() == ["cat", "dog"]
        assert arrays["prompts"].tolist() == ["cat", "kitten", "dog", "sky"]


def test_steps_are_settings_of_the_method(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "cat", "--steps", "scga", "--json", "-q", "--save", "none")
    document = json.loads(result.stdout)
    method = METHODS["gem"].replace(steps=(find_step("scga"),))
    expected = open_gem.load(tiny, device="cpu", method=method)("cat.png", "cat")
    assert document["method"] == {"name": "gem", **method.describe()}
    assert [entry["point"] for entry in document["labels"]] == expected.points().tolist()


def test_distractors_change_heatmaps_unless_a_scale_is_given(tiny: str, place: Path):
    drawn = {}
    for name, arguments in {
        "alone": (),
        "against": ("-n", "dog"),
        "stretched": ("-n", "dog", "--heatmap-scale", "minmax"),
    }.items():
        ground(tiny, "cat.png", "-p", "cat", "--save", "heatmap", "--out", name, *arguments)
        drawn[name] = pixels(f"{name}/cat.cat.heatmap.png")
    assert np.array_equal(drawn["alone"], drawn["stretched"])
    assert not np.array_equal(drawn["alone"], drawn["against"])


def test_a_heatmap_of_cosines_has_no_seams(tiny: str, place: Path):
    ground(tiny, "cat.png", "-p", "cat", "--save", "heatmap", "--heatmap-scale", "cosine")
    [cosines] = open_gem.load(tiny, device="cpu")("cat.png", "cat").heatmaps("cosine")
    assert cosines.min() < 0
    drawn = pixels("open_gem_out/cat.cat.heatmap.png")
    assert np.abs(drawn / 65535 * 2 - 1 - cosines.numpy()).max() < 1e-4


def test_views_templates_and_the_rest_reach_the_result(tiny: str, place: Path):
    settings = {
        "views": open_gem.Views(window=32, stride=16, scales=(1, 1.5), flip=True, merge="logits"),
        "refinement": open_gem.Pamr(),
        "remove_redundancy": True,
        "template": "imagenet-7",
    }
    arguments = [
        "--window",
        "32",
        "--stride",
        "16",
        "--scales",
        "1,1.5",
        "--flip",
        "--merge",
        "logits",
        "--refine",
        "pamr",
        "--remove-redundancy",
    ]
    result = ground(
        tiny, "cat.png", "-p", "cat", "-p", "dog", *arguments, "--template", "imagenet-7", "--save", "npz,json"
    )
    assert result.exit_code == 0, result.output
    localizer = open_gem.Localizer(open_gem.load(tiny, device="cpu").backbone, **settings)
    expected = localizer("cat.png", ["cat", "dog"])
    document = json.loads(Path("open_gem_out/cat.json").read_text())
    assert [entry["point"] for entry in document["labels"]] == expected.points().tolist()
    told = json.loads(json.dumps(localizer.describe()))
    assert {name: document[name] for name in settings} == {name: told[name] for name in settings}
    with np.load("open_gem_out/cat.npz") as arrays:
        assert arrays["similarity"].shape == expected.similarity.shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "x", "--method", "gem,gme"], ["gme", "did you mean gem"]),
        (["-p", "x", "--method", "proxyclip:"], ["proxyclip:facebook/dino-vitb8"]),
        (["-p", "x", "--method", "proxyclip:nothing/", "--depth", "2"], ["nothing/"]),
        (["-p", "x", "--method", "clip", "--depth", "3"], ["depth", "'clip'"]),
        (["-p", "x", "--method", "gem,clip", "--iterations", "2"], ["iterations", "'clip'"]),
        (["-p", "x", "--classes", "classes.txt"], ["--classes and --prompt"]),
        (["-p", "x", "--first-is-background"], ["--classes"]),
        (["--classes", "classes.json"], ["'classes.json'", "labels"]),
        (["-p", "x", "--steps", "sgca"], ["sgca", "did you mean scga"]),
        (["-p", "x", "--refine", "pram"], ["pram", "did you mean pamr"]),
        (["--classes", "none.txt"], ["none.txt"]),
        (["-p", "x", "--heatmap-scale", "loud"], ["loud", "minmax"]),
        (["-p", "x", "--scales", "1,x"], ["1,x"]),
        (["-p", "x", "--stride", "16"], ["stride", "window"]),
        (["-p", "x", "--window", "30"], ["30", "24 or 32"]),
        (["-p", "x", "--window", "32", "--merge", "maps"], ["maps", "features, logits"]),
        (["-p", "x", "--template", "imagenet-70"], ["imagenet-70", "did you mean imagenet-7"]),
        (["-p", "x", "-n", " "], ["background", "empty"]),
        (["-p", "x", "--method", "gem-kmeans", "--iterations", "2"], ["iterations"]),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: list[str], tiny: str, place: Path):
    Path("classes.txt").write_text("cat\n")
    Path("classes.json").write_text('{"labels": 3}')
    refused(ground(tiny, "cat.png", *arguments), *words)


@pytest.fixture
def expert(place: Path) -> str:
    """The path of a small DINO with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained("expert")
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    Path("expert/preprocessor_config.json").write_text(json.dumps(statistics))
    return "./expert"


@pytest.mark.parametrize("kind", GUIDED)
def test_an_expert_makes_a_method_by_name(tiny: str, expert: str, kind: str):
    result = ground(tiny, "cat.png", "-p", "cat", "--method", f"gem,{kind}:{expert}", "--save", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(Path(f"open_gem_out/{kind}-expert/cat.json").read_text())
    assert "Expert('./expert')" in str(document["method"])
    alone = ground(tiny, "cat.png", "-p", "cat", "--method", f"{kind}:{expert}", "--out", "alone")
    assert alone.exit_code == 0, alone.output
    assert files("alone") == {"cat.cat.overlay.png", "cat.json"}


def test_regions_reach_corrclip_and_give_each_region_a_single_label(tiny: str, expert: str):
    masks = np.kron(np.array([[1, 2], [0, 3]], dtype=np.uint8), np.ones((30, 40), dtype=np.uint8))
    Image.fromarray(masks).save("masks.png")
    arguments = ("-p", "cat", "-p", "dog", "--save", "json,segmentation,npz", "--method", f"corrclip:{expert}")
    masked = ground(tiny, "cat.png", *arguments, "--regions", "masks.png")
    assert masked.exit_code == 0, masked.output
    assert ground(tiny, "cat.png", *arguments, "--out", "plain").exit_code == 0
    with np.load("open_gem_out/cat.npz") as ours, np.load("plain/cat.npz") as plain:
        assert not np.allclose(ours["similarity"], plain["similarity"])
    localizer = open_gem.load(tiny, device="cpu", method=f"corrclip:{expert}")
    prepared = localizer.prepare("cat.png", "masks.png")
    labels = localizer.locate(localizer.encode(prepared), ["cat", "dog"]).segment(regions=prepared.regions)
    assert all(len(labels[torch.from_numpy(masks) == number].unique()) == 1 for number in (1, 2, 3))
    expected = segmentation(Image.open("cat.png").convert("RGB"), labels, ["cat", "dog"])
    assert np.array_equal(pixels("open_gem_out/cat.segmentation.png"), np.asarray(expected))


def test_regions_are_those_of_a_single_image(tiny: str, place: Path):
    refused(ground(tiny, "cat.png", "cat.png", "-p", "x", "--regions", "masks.png"), "--regions", "2 are given")
    refused(ground(tiny, "cat.png", "-p", "x", "--regions", "masks.png"), "masks.png", "No such file")


def test_a_step_with_an_expert_goes_with_any_method(tiny: str, expert: str):
    result = ground(tiny, "cat.png", "-p", "cat", "--method", "maskclip", "--steps", f"lposs:{expert}")
    assert result.exit_code == 0, result.output
    by_name = ground(tiny, "cat.png", "-p", "cat", "--method", f"lposs:{expert}", "--out", "by name")
    assert by_name.exit_code == 0, by_name.output
    ours, theirs = (json.loads(Path(f"{out}/cat.json").read_text()) for out in ("open_gem_out", "by name"))
    assert ours["labels"] == theirs["labels"] and ours["objects"] == theirs["objects"]


# Models and methods --------------------------------------------------------------------------------------------------


def test_families_are_listed():
    rows = json.loads(call("models", "--json").stdout)
    assert [row["family"] for row in rows] == ["embedded", *(row.name for row in FAMILIES)]
    assert all(row["examples"] and row["about"] and row["tested"] for row in rows)


def test_a_few_models_are_recommended_with_size_speed_scores_and_licence():
    rows = json.loads(call("models", "--recommend", "--json").stdout)
    assert (rows[0]["name"], rows[0]["tag"], rows[0]["download_mb"], rows[0]["licence"]) == (*DEFAULT_MODEL, 598, "MIT")
    assert rows[0]["published"] == {"VOC": 46.2, "Context": 32.6, "ADE20K": 15.7}
    table = call("models", "--recommend").stdout
    assert all(row["name"] in table and f"{row['download_mb']} MB" in table for row in rows)


def test_every_model_is_listed_with_the_reason_if_it_is_unsupported():
    rows = {(row["name"], row["tag"]): row for row in json.loads(call("models", "--all", "--json").stdout)}
    assert set(rows) > {("embedded", None), *(tuple(pair) for pair in open_clip.list_pretrained())}
    assert rows["embedded", None]["unsupported_reason"] is rows["ViT-B-16", "openai"]["unsupported_reason"] is None
    assert rows["coca_ViT-B-32", "laion2b_s13b_b90k"]["family"] == "CoCa"
    assert "ResNet" in rows["RN50", "openai"]["unsupported_reason"]
    assert "ConvNeXt" in rows["convnext_base", "laion400m_s13b_b51k"]["unsupported_reason"]


def test_every_model_is_counted_once():
    text = call("models", "--all").stdout
    read, refused = (
        re.search(rf"(\d+) of open_clip's (\d+) architectures {what}:", text) for what in ("can be read", "cannot")
    )
    assert read and refused and read[2] == refused[2]
    assert int(read[1]) + int(refused[1]) == int(read[2])
    counts = [int(count) for count in re.findall(r"(?m)^ +(\d+) \S", text)]
    assert sum(counts) == int(read[2]) == len(open_clip.list_models())
    assert re.search(r"(?m)^ +10 its vision tower is a ResNet", text)


def test_a_check_compares_with_the_library():
    [document] = json.loads(call("models", "--check", "embedded", "--json").stdout)
    assert (document["name"], document["dtype"], document["equal"], document["rounding"]) == (
        "embedded",
        "float32",
        True,
        [],
    )
    assert {(tuple(row["size"]), row["exact"]) for row in document["differences"]} == {
        ((128, 128), True),
        ((128, 128), False),
        ((144, 64), True),
        ((144, 64), False),
    }
    assert all(row["tokens"] == row["pooled"] == 0 for row in document["differences"] if row["exact"])


def test_a_check_in_half_precision_says_what_it_costs():
    [document] = json.loads(call("models", "--check", "embedded", "--dtype", "bfloat16", "--json").stdout)
    assert [row["method"] for row in document["rounding"]] == list(METHODS)
    assert all(0 < row["mean"] <= row["worst"] < 0.01 for row in document["rounding"])
    result = call("models", "--check", "embedded", "--dtype", "float16")
    assert result.exit_code == 0
    assert "gem" in result.stdout and "what float16 costs" in result.stdout


def test_a_check_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(NativeTower, "pool", lambda self, tokens: self.project(tokens[:, 1]))
    result = call("models", "--check", "embedded")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: not equal")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check", "RN50"], "cannot read RN50"),
        (["--check", "ViT-B-61"], "unknown model 'ViT-B-61'"),
        (["--check", "embedded", "--dtype", "int8"], "cannot compute in int8, expected auto or one of float32"),
        (["--check", "embedded", "--all"], "give one of them"),
        (["--recommend", "--all"], "give one of them"),
        (["--dtype", "bfloat16"], "--dtype and --device are for --check"),
        (["--check", "embedded", "--device", "quantum"], "cannot use device 'quantum'"),
    ],
)
def test_checks_that_make_no_sense(arguments, words):
    result = call("models", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_methods_with_gradients_are_taken_by_name(tiny: str, place: Path):
    result = ground(tiny, "cat.png", "-p", "a cat", "-p", "a dog", "--method", "gem,clip-es", "--json", "-q")
    assert result.exit_code == 0, result.stderr
    settings = [json.loads(line)["method"] for line in result.stdout.splitlines()]
    assert [method["name"] for method in settings] == ["gem", "clip-es"] and settings[1]["blocks"] == 8
    refused = ground(tiny, "cat.png", "-p", "a cat", "--method", "clip-es", "--flip")
    assert refused.exit_code == 2 and "whole image" in refused.stderr


def test_methods_are_listed_with_their_settings():
    rows = json.loads(call("methods", "--json").stdout)
    known = METHODS | GRADIENTS
    assert [row.pop("name") for row in rows] == list(known)
    for row, method in zip(rows, known.values(), strict=True):
        assert row["about"]
        assert {key: value for key, value in row.items() if key != "about"} == method.describe()


@pytest.mark.parametrize("arguments", [["models"], ["models", "--all"], ["methods"]])
def test_tables_for_people(arguments: list[str]):
    result = call(*arguments)
    assert result.exit_code == 0
    assert {"models": "ViT-B-16", "methods": "gem"}[arguments[0]] in result.stdout
    assert result.stderr == ""


def test_a_model_of_few_blocks(shallow: str, place: Path):
    """A name is no deeper than the model; a depth that was asked for is taken as it is, or refused."""
    result = ground(shallow, "cat.png", "-p", "x", "--method", "all", "--json", "--quiet", "--save", "none")
    assert result.exit_code == 0, result.output
    depths = {one["method"]["name"]: one["method"]["depth"] for one in map(json.loads, result.stdout.splitlines())}
    assert depths == {name: min(row.depth, 3) for name, row in METHODS.items()}
    result = ground(shallow, "cat.png", "-p", "x", "--depth", 2, "--json", "--quiet", "--save", "none")
    assert json.loads(result.stdout)["method"]["depth"] == 2
    refused(ground(shallow, "cat.png", "-p", "x", "--depth", 6), "depth 6", "3 blocks", "expected depth 3 at most")


COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_has_a_short_name_everywhere(command: list[str]):
    short, long = call(*command, "-h"), call(*command, "--help")
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "Usage" in short.stdout


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["-p", "cat,dog"], "'cat,dog' is one prompt, comma included; for 2 prompts: -p cat -p dog"),
        (["-p", "cat", "-n", "blue sky, wall"], "-n 'blue sky' -n wall"),
        (["-p", "@list.txt"], "'cow, pig' is one prompt"),
        (["-p", "cat", "-p", "dog,"], None),
    ],
)
def test_a_comma_in_a_prompt_is_a_warning_that_shows_how_to_give_two(
    arguments: list[str], warning: str | None, tiny: str, place: Path
):
    Path("list.txt").write_text("cat\ncow, pig\n")
    result = ground(tiny, "cat.png", *arguments, "--quiet", "--save", "none")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("\n") == (warning is not None)
    assert warning is None or warning in result.stderr


def test_settings_without_effect_are_refused_or_warned_about(tiny: str, place: Path):
    refused(
        ground(tiny, "cat.png", "-p", "x", "--method", "clip", "--depth", 2, "--iterations", 5),
        "--depth and --iterations have no effect with method 'clip'",
    )
    result = ground(tiny, "cat.png", "-p", "x", "--background", 0.5)
    assert result.exit_code == 0
    assert result.stderr == "warning: --background has no effect without --save segmentation\n"


def test_an_image_too_large_for_the_memory_leaves_the_others_alone(
    tiny: str, place: Path, monkeypatch: pytest.MonkeyPatch
):
    random_image(20, 20).save("large.png")
    prepare = open_gem.Localizer.prepare

    def short_of_memory(self: open_gem.Localizer, image: Image.Image) -> object:
        if image.height == 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return prepare(self, image)

    monkeypatch.setattr(open_gem.Localizer, "prepare", short_of_memory)
    result = ground(tiny, "large.png", "cat.png", "-p", "x", "--json")
    assert result.exit_code == 1
    failed, done = map(json.loads, result.stdout.splitlines())
    assert failed == {
        "path": "large.png",
        "error": "'large.png' does not fit into memory; try --image-size long:N or --window",
    }
    assert done["path"] == "cat.png"


# Evaluate -------------------------------------------------------------------------------------------------------------


def measured(*arguments: object) -> dict[str, dict]:
    result = call("evaluate", *arguments, "--json", "-q")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line["method"]: line for line in lines}


def test_evaluate_prints_a_line_a_method_and_resumes(tiny: str, place: Path):
    lines = measured("scenes", "--limit", 2, "--method", "clip,gem", "--model", tiny)
    assert list(lines) == ["clip", "gem"]
    for line in lines.values():
        assert (line["dataset"], line["images"], line["failed"], line["protocol"]) == ("scenes", 2, 0, "paper")
        assert {"pointing_game", "mask_iou", "mean_iou", "top1"} <= line["scores"].keys()
        assert all(0 <= found["value"] <= 1 for found in line["scores"].values())
    [folder] = Path("open_gem_results").iterdir()
    parts = set(folder.glob("part-*"))
    assert measured("--limit", 2, "--method", "clip,gem", "--model", tiny) == lines
    assert set(folder.glob("part-*")) == parts
    more = measured("--limit", 3, "--method", "clip,gem", "--model", tiny)
    assert more["gem"]["images"] == 3


def test_shards_add_up(tiny: str, place: Path):
    few = ("--limit", 8, "--method", "gem", "--model", tiny)
    whole = measured(*few, "--out", "whole")
    parts = [measured(*few, "--out", "shards", "--shard", f"{index}/2")["gem"]["images"] for index in (1, 0)]
    assert sum(parts) == 8 and all(parts)
    assert measured(*few, "--out", "shards") == whole
    none = call("evaluate", *few, "--limit", 1, "--shard", "0/99", "--out", "none")
    assert none.exit_code == 0 and "shard 0/99 has none of the 1 images" in none.stderr
    assert not Path("none").exists()


def test_fewer_images_than_were_measured_are_reported_as_that(tiny: str, place: Path):
    few = measured("--limit", 2, "--method", "gem", "--model", tiny, "--out", "few")
    measured("--limit", 4, "--method", "gem", "--model", tiny)
    assert measured("--limit", 2, "--method", "gem", "--model", tiny) == few


def test_an_interruption_is_one_line(tiny: str, place: Path, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("open_gem.evaluation.store.measure", interrupted)
    for command in (["evaluate"], ["reproduce", "table4"]):
        result = call(*command, "--limit", 2, "--model", tiny, "-q")
        assert result.exit_code == 130
        assert result.stderr == "interrupted: results so far are kept; rerun the same command to resume\n"


def test_a_table_and_a_report_of_all_runs(tiny: str, place: Path):
    for protocol in ("paper", "official"):
        table = call("evaluate", "--limit", 1, "--method", "gem", "--model", tiny, "--protocol", protocol)
        assert table.exit_code == 0, table.output
        assert "pointing" in table.stdout and "gem" in table.stdout
    report = call("report")
    assert report.exit_code == 0
    assert report.stdout.count("## scenes held-out") == 2
    assert set(re.findall(r"protocol (\w+)", report.stdout)) == {"paper", "official"}
    alone = call("report", "--against", "gem")
    assert alone.exit_code == 2 and "has counts of 'gem' and of another method" in alone.stderr
    assert call("evaluate", "--limit", 1, "--method", "gem,clip", "--model", tiny).exit_code == 0
    assert call("report", "--against", "gem").stdout.count("| clip − gem |") == 1
    assert call("report", "--out", "all.csv").exit_code == 0
    assert Path("all.csv").read_text().count("\n") == 5
    assert call("report", "--out", "report.html").exit_code == 0
    assert Path("report.html").read_text().startswith("<!doctype html>")


def test_evaluate_scales_adaptive_temperatures_only(tiny: str, place: Path):
    one, other = (
        measured("--limit", 2, "--temperature-scale", scale, "--model", tiny, "--out", str(scale))
        for scale in (1, 0.01)
    )
    assert {name for name in one if one[name]["scores"] != other[name]["scores"]} == {"gem"}


def test_an_unreadable_image_is_reported_and_the_others_are_measured(tiny: str, place: Path):
    root = place / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b"):
        random_image().save(root / "JPEGImages" / f"{name}.jpg")
        labels = Image.new("P", (80, 60), 3)
        labels.putpalette([0] * 768)
        labels.save(root / "SegmentationClass" / f"{name}.png")
    (root / "JPEGImages" / "a.jpg").write_bytes(b"broken")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\n")
    result = call("evaluate", "voc2012", "--data-root", place, "--model", tiny, "--method", "gem", "--json", "-q")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: a: ") and result.stderr.count("\n") == 1
    line = json.loads(result.stdout)
    assert (line["images"], line["failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet"], "unknown data set 'imagenet'"),
        (["voc2012"], "open-gem data show voc2012"),
        (["--method", "gem,gam"], "unknown method 'gam'"),
        (["--image-size", "huge"], "size rule 'huge'"),
        (["--protocol", "feild"], "did you mean field"),
        (["--shard", "2/2"], "shard is '2/2'"),
        (["--temperature-scale", "0"], "temperature_scale is 0"),
    ],
)
def test_evaluate_refuses(arguments: list[str], words: str, place: Path):
    result = call("evaluate", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


# The program itself ---------------------------------------------------------------------------------------------------


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"open-gem {open_gem.__version__}\n")


@pytest.mark.parametrize("command", ["", "ground", "demo", "models", "methods"])
def test_help(command: str):
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_is_light():
    code = (
        "import sys; sys.argv = ['open-gem', 'ground', '--help']\n"
        "from open_gem import cli\n"
        "try: cli.main()\n"
        "finally: sys.exit(' '.join({'torch', 'open_clip', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 or run.stderr == "\n", run.stderr
    assert "--method" in run.stdout


@pytest.mark.slow
def test_as_a_program_on_a_poor_terminal(tiny: str, place: Path):
    command = [sys.executable, "-c", "from open_gem.cli import main; main()"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "ground", "cat.png", "missing.png", "-p", "кот", "--model", tiny],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 1
    assert run.stderr == "error: 'missing.png' does not exist\n"
    assert "\\u043a\\u043e\\u0442" in run.stdout  # кот, as far as it can be written
    assert (place / "open_gem_out" / "cat.json").exists()
