"""A server that never answers: `hanging://…`, for readers that have to do something about it."""

from threading import Event
from typing import Any

import fsspec


class Hanging(fsspec.AbstractFileSystem):
    protocol = "hanging"

    def info(self, path: Any, *given: Any, **options: Any) -> Any:
        Event().wait()

    def ls(self, path: Any, *given: Any, **options: Any) -> Any:
        Event().wait()

    def _open(self, path: Any, *given: Any, **options: Any) -> Any:
        Event().wait()


def register() -> None:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
