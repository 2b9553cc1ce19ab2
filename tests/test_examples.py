"""Examples are run where what they need is installed: gradio is not among what the tests need."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "gradio_app.py"

ASK = """
import runpy, sys, numpy as np, gradio
from PIL import Image
from open_gem.data.scenes import scene

made, app = scene(0, (384, 512)), runpy.run_path(sys.argv[1])
picture = Image.fromarray(made.image)
(shown, drawn), rows = app["ground"](picture, ", ".join([*made.names, "octopus"]), "gem", 0.5, 0.5)
assert shown.size == (512, 384) and [row[0] for row in rows] == [*made.names, "octopus"], rows
masks = {name: mask for mask, name in drawn}
assert set(masks) <= set(made.names), set(masks)  # the octopus is not drawn
cake = made.masks[made.names.index("birthday cake")]
assert np.logical_and(masks["birthday cake"], cake).sum() > 0.5 * cake.sum()
for given in ((None, "a"), (picture, " , ")):
    try:
        app["ground"](*given, "gem", 0.5, 0.5)
    except gradio.Error:
        continue
    raise AssertionError(given)
print(len(app["demo"].get_config_file()["components"]), "components")
"""


def test_the_app_for_a_space_is_short():
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 60


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs pip install gradio")
def test_the_app_for_a_space_grounds_phrases_and_says_what_is_wrong():
    run = subprocess.run([sys.executable, "-c", ASK, str(EXAMPLE)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "components" in run.stdout, run.stderr
