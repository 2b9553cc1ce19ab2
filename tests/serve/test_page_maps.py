"""What the page makes of a similarity grid is what the library makes of it: both are asked, in a real browser."""

import ast
import base64
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium

import open_gem
from open_gem import Localization, readout
from open_gem.serve.routes_about import constants
from open_gem.types import Size

PAGE = Path(open_gem.__file__).parent / "serve" / "page"
ORIGIN = "http://page.test/"

READ = """async ([rows, cols, values, height, width, threshold]) => {
  const maps = await import("/maps.js");
  const map = maps.upsample({ rows, cols, values: maps.decodeHalf(values) }, { height, width });
  const mask = maps.maskOf(map, threshold);
  return { values: [...map.values], mask: [...mask], boxes: maps.boxesOf(mask, map, 0), peak: maps.peakOf(map) };
}"""


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """A blank page that can import the page's modules; no server is needed for that."""

    def answer(route: Any) -> None:
        name = route.request.url.removeprefix(ORIGIN)
        if name == "constants.js":
            route.fulfill(body=constants(), content_type="text/javascript")
        elif name:
            route.fulfill(path=PAGE / name, content_type="text/javascript")
        else:
            route.fulfill(body="<!doctype html>", content_type="text/html")

    with chromium() as browser:
        page = browser.new_page()
        page.route("**/*", answer)
        page.goto(ORIGIN)
        yield page


def halves(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f2").tobytes()).decode()


CASES = [  # the grid, the picture, the threshold
    ((10, 10), (64, 64), 0.5),
    ((7, 12), (90, 151), 0.3),
    ((5, 3), (4, 2), 0.6),  # a picture smaller than its grid
    ((1, 6), (1, 40), 0.5),
    ((14, 9), (211, 130), 0.8),
]


@pytest.mark.parametrize(("grid", "size", "threshold"), CASES)
def test_maps_masks_boxes_and_points_are_the_librarys(modules, grid, size, threshold):
    similarity = torch.randn(grid, generator=torch.Generator().manual_seed(sum(grid))).mul(0.1).half().float()
    found = modules.evaluate(READ, [*grid, halves(similarity), *size, threshold])
    expected = readout.upsample(similarity, Size(*size))
    mask = readout.min_max(expected) > threshold
    [boxes] = Localization(("it",), similarity[None], Size(*size)).boxes(threshold)
    np.testing.assert_allclose(np.reshape(found["values"], size), expected, atol=1e-6)
    assert np.array_equal(np.reshape(found["mask"], size), mask)
    assert [one["box"] for one in found["boxes"]] == boxes.xyxy.tolist()
    np.testing.assert_allclose([one["score"] for one in found["boxes"]], boxes.scores, atol=1e-6)
    assert tuple(found["peak"]) == readout.peak(expected)


def test_components_meet_at_corners_and_in_bends(modules):
    drawn = ["#.#....#", ".#.#..#.", "#...##..", "........", "####.###", "#..#.#..", "#.##.###"]
    mask = torch.tensor([[cell == "#" for cell in row] for row in drawn])
    values = torch.arange(mask.numel()).reshape(mask.shape).float()
    height, width = mask.shape
    script = """async ([mask, height, width]) => {
      const { boxesOf } = await import("/maps.js");
      return boxesOf(mask, { height, width, values: mask.map((_, at) => at) }, 0);
    }"""
    joined = modules.evaluate(script, [mask.int().flatten().tolist(), height, width])
    [expected] = Localization(("it",), values.where(mask, -1.0)[None], Size(height, width)).boxes(-0.5, "cosine")
    assert [(one["box"], one["score"]) for one in joined] == list(
        zip(expected.xyxy.tolist(), expected.scores.tolist(), strict=True)
    )


def test_nothing_stands_out_of_a_constant_map(modules):
    found = modules.evaluate(READ, [4, 4, halves(torch.full((4, 4), 0.1)), 50, 50, 0.0])
    assert not any(found["mask"]) and found["boxes"] == []


def test_every_half_is_read(modules):
    bits = np.arange(1 << 16, dtype="<u2")
    finite = bits[np.isfinite(bits.view("<f2"))]
    text = base64.b64encode(finite.tobytes()).decode()
    read = modules.evaluate("""async (text) => [...(await import("/maps.js")).decodeHalf(text)]""", text)
    assert np.array_equal(np.array(read, dtype=np.float32), finite.view("<f2").astype(np.float32))


def test_small_components_are_left_out(modules):
    mask = torch.zeros(20, 20, dtype=torch.int)
    mask[2:6, 3:9], mask[15, 15:17] = 1, 1
    script = """async ([mask, least]) => {
      const { boxesOf } = await import("/maps.js");
      return boxesOf(mask, { height: 20, width: 20, values: mask }, least).map(({ box, area }) => [...box, area]);
    }"""
    large, small = [3, 2, 9, 6, 24], [15, 15, 17, 16, 2]
    for least, expected in [(0, [large, small]), (2 / 400, [large, small]), (3 / 400, [large]), (25 / 400, [])]:
        assert modules.evaluate(script, [mask.flatten().tolist(), least]) == expected


def test_a_value_is_read_where_the_probe_is(modules):
    similarity = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).half().float()
    expected = readout.upsample(similarity, Size(60, 90))
    asked = [(0, 0), (59, 89), (31, 4), (17, 66)]
    script = """async ([values, places]) => {
      const { decodeHalf, valueAt } = await import("/maps.js");
      const grid = { rows: 6, cols: 9, values: decodeHalf(values) };
      return places.map(([y, x]) => valueAt(grid, [(x + 0.5) / 90, (y + 0.5) / 60]));
    }"""
    read = modules.evaluate(script, [halves(similarity), asked])
    np.testing.assert_allclose(read, [expected[place] for place in asked], atol=1e-6)


NASTY = [
    "it's",
    '"quoted" $HOME `id`',
    "@file",
    "-p",
    "naïve café 猫 🐈",
    "back\\slash",
    "a;b|c&d",
    "line\u2028end",
    "#no",
]


def test_lines_say_any_prompt(modules):
    view = {
        "file": "-my cats.jpg",
        "origin": None,
        "token": None,
        "model": {"name": "ViT-B-16, openai", "size": "short:448", "dtype": "bfloat16", "template": "a {}"},
        "prompts": NASTY,
        "methods": ["clip", "gem"],
        "threshold": 0.3,
        "presence": 0.25,
    }
    script = """async (view) => {
      const lines = await import("/lines.js");
      return [lines.shellLines(view), lines.pythonLines(view)];
    }"""
    several = view | {"model": view["model"] | {"template": ["a {}", "the {}"]}}
    shell, python = modules.evaluate(script, several)
    assert shlex.split(shell, comments=True) == [] and "see Python" in shell and 'template=["a {}", "the {}"]' in python
    shell, python = modules.evaluate(script, view)
    assert shlex.split(shell) == [
        *("open-gem", "ground", "./-my cats.jpg"),
        *(word for prompt in NASTY for word in ("-p", " @file" if prompt == "@file" else prompt)),
        *("--model", "ViT-B-16", "--pretrained", "openai", "--image-size", "short:448", "--dtype", "bfloat16"),
        *("--template", "a {}", "--method", "clip,gem", "--threshold", "0.3"),
        *("--presence", "0.25", "--save", "overlay,mask,json"),
    ]
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)}
    literal = ("open_gem.load", "localizer.encode", "result.masks", "result.boxes")
    given = {name: [ast.literal_eval(argument) for argument in calls[name].args] for name in literal}
    assert given["open_gem.load"] == ["ViT-B-16", "openai"]
    assert given["localizer.encode"] == ["-my cats.jpg", ["clip", "gem"]]
    assert ast.literal_eval(calls["localizer.locate"].args[1]) == NASTY
    assert given["result.masks"] == given["result.boxes"] == [0.3]
    settings = {one.arg: ast.literal_eval(one.value) for one in calls["open_gem.load"].keywords}
    assert settings == {"size": "short:448", "dtype": "bfloat16", "template": "a {}"}
    like = {"text": "box 1 in a.png", "file": "a.png", "box": [1, 2, 30, 40], "origin": "http://there/a.png"}
    samples = {"file": "b.png", "origin": "http://there/b.png", "likes": [like, like]}
    shell, python = modules.evaluate(script, view | samples)
    first, second, command = shell.split("\n")
    assert [shlex.split(line)[-2:] for line in (first, second)] == [
        ["b.png", "http://there/b.png"],
        ["a.png", "http://there/a.png"],
    ]
    assert command.count("--like 'box 1 in a.png=a.png:1,2,30,40'") == 2
    assert 'Exemplar("a.png", (1, 2, 30, 40), "box 1 in a.png")' in python
    compile(python, "", "exec")
    views = {"window": 224, "stride": None, "scales": [1, 1.5], "flip": True, "merge": "logits"}
    shell, python = modules.evaluate(script, view | {"model": view["model"] | {"views": views}})
    words = shlex.split(shell)
    assert words[words.index("--window") : words.index("--method")] == [
        *("--window", "224", "--scales", "1,1.5", "--flip", "--merge", "logits"),
    ]  # fmt: skip
    assert 'views=Views(window=224, scales=(1,1.5,), flip=True, merge="logits")' in python
    compile(python, "", "exec")
