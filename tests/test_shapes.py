"""The shapes in signatures are true: a whole call is checked against them, at every function that has some."""

import subprocess
import sys

import pytest

CHECKED = """
from jaxtyping import install_import_hook

ROOMS = ("method", "tensors", "readout", "windows", "localization", "locate", "localizer", "towers", "images.views")
with install_import_hook([f"open_gem.{room}" for room in ROOMS], "beartype.beartype"):
    import open_gem
    from open_gem import METHODS, Pamr, Views
    from open_gem.data.scenes import scene
    from open_gem.method.steps import Scga

image, prompts = scene(0, size=200).image, {"cat": ["cat", "monkey"], "dog": "dog"}
localizer = open_gem.load("embedded", device="cpu", size="short:96")
for encoded in localizer.encode(image, METHODS | {"stepped": METHODS["gem"].replace(steps=(Scga(),))}).values():
    localizer.locate(encoded, prompts).segment(0.5)
for merge in ("features", "logits"):
    views = Views(window=64, stride=32, flip=True, merge=merge)
    result = localizer.configured(views=views, refinement=Pamr(iterations=1))([image, image], prompts)[0]
    print(len(result.objects(visit=None)), result.points().shape, result.boxes()[0].xyxy.shape)
"""


@pytest.mark.slow
def test_a_call_keeps_the_shapes_that_signatures_promise():
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("torch.Size([2, 2])") == 2


@pytest.mark.slow
def test_a_shape_that_is_not_kept_is_an_error():
    code = CHECKED.partition("image, prompts")[0] + "import torch\nfrom open_gem.tensors import similarity\n"
    wrong = subprocess.run(
        [sys.executable, "-c", code + "similarity(torch.zeros(3, 4), torch.zeros(2, 5))"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "TypeCheckError" in wrong.stderr
