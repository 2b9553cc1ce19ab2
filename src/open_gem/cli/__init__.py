"""The command line: `open-gem COMMAND --help`. One file a command; torch and the models are imported when they run.

Results go to stdout; progress, warnings and errors go to stderr, one line each. Exit codes: 0 success, 1 some images
failed and the others are done, 2 the request was wrong, 130 interrupted.
"""

from open_gem.cli import ground, label, relabel, summary, tune, export, demo, evaluate, reproduce, verify  # noqa: I001 - importing registers a command; the order of help
from open_gem.cli import clusters, models, bench, data, serve
from open_gem.cli.app import app, main

__all__ = [
    "app",
    "bench",
    "clusters",
    "data",
    "demo",
    "evaluate",
    "export",
    "ground",
    "label",
    "main",
    "models",
    "relabel",
    "reproduce",
    "serve",
    "summary",
    "tune",
    "verify",
]
