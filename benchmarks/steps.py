"""Time and peak memory of each step: `python benchmarks/steps.py`, see docs/reference/methods.md.

Features are random, 512 a patch, and the last block's values 768; the process's peak so far is printed.
"""

import resource
from time import perf_counter

import torch

from open_gem.method.steps import STEPS, VALUES, StepContext
from open_gem.types import Grid

for side in (28, 32, 100):
    features, values = torch.randn(side**2, 512), torch.randn(side**2, 768) + 2
    for name, make in STEPS.items():
        start = perf_counter()
        make()(features, StepContext(Grid(side, side), {VALUES: values}))
        seconds = perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{side**2:6} patches  {name:6} {seconds:6.2f} s  {peak:5.0f} MiB")
