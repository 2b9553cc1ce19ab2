"""The script for a GPU, run on a CPU in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"


@pytest.mark.slow
def test_every_section_is_measured_and_written(tiny, tmp_path):
    options = ("--device", "cpu", "--quick", "--model", tiny, "--side", "32", "--turns", "1", "--minutes", "30")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "device.json").read_text())["sections"]
    assert list(sections) == ["parity", "methods", "attention", "times", "label"]
    assert {name: section["ended"] for name, section in sections.items()} == dict.fromkeys(sections, "whole")
    assert all(section["rows"] for section in sections.values())
    assert all(row["correct"] for row in sections["parity"]["rows"])
    assert {row["case"] for row in sections["times"]["rows"]} == {"plain", "gem"}
    table = (tmp_path / "device.md").read_text()
    assert all(f"## {name}" in table for name in sections)
