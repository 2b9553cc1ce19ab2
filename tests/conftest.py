"""Shared hosts: the seeded checkpoints that the published implementations were run on, and a tiny fake one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_gem import backbones

PARITY = Path(__file__).parent / "data" / "parity"


class Reference:
    """One folder of `data/parity`: a checkpoint, and what the published code made of it (see its README)."""

    def __init__(self, name: str):
        self.folder = PARITY / name
        self.backbone = backbones.load(f"local-dir:{self.folder}", device="cpu")
        self.cases = {case["key"]: case for case in json.loads((self.folder / "cases.json").read_text())}

    def arrays(self, file: str = "reference") -> dict[str, torch.Tensor]:
        with np.load(self.folder / f"{file}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="session")
def square() -> Reference:
    return Reference("gem_square")


@pytest.fixture(scope="session")
def resampled() -> Reference:
    return Reference("gem_resampled")
