"""Rows of `open-gem verify` on small random checkpoints: what the library gives stands for what was published."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from open_gem.verify.images import ImageStore
from open_gem.verify.run import FAILED, PASSED, judge, verify


def check_row(row: Any, checkpoint: Path, image: Image.Image, folder: Path, library: Callable[..., Tensor]) -> None:
    """The row passes with the library's numbers of an image, and fails if any of them is wrong, or the image is.

    folder   for images under the names that are looked for
    library  image → its numbers
    """
    image.save(folder / row.image)
    store = ImageStore(folder)
    expected = tuple(library(store(row.image)).tolist())
    row = replace(row, checkpoint=str(checkpoint), expected=expected)

    [result] = verify([row], store, device="cpu")
    assert len(expected) > 0 and result.status == PASSED, result
    for index, number in enumerate(expected):
        wrong = (*expected[:index], number + 1.5 * row.tolerance, *expected[index + 1 :])
        assert judge(replace(row, expected=wrong), result.measured or ()).status == FAILED
    ImageOps.mirror(image).save(folder / row.image)
    [result] = verify([row], store, device="cpu")
    assert result.status == FAILED
