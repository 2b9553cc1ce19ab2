"""Files that are there whole or not at all, and letters that stand for settings."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from open_gem.errors import OutputError

Writer = Callable[[BinaryIO], None]


def write_file(path: Path, content: Writer | bytes, *, durable: bool = False) -> None:
    """Make a file in one go: written beside its place under another name, then moved there. Raises OutputError.

    durable  safe on disk before it has its name: or a power cut may leave the name without the content
    """
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Raise OutputError unless files can be made in `folder`, or it itself can be made; leaves nothing behind."""
    try:
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error


def digest(settings: Mapping[str, Any]) -> str:
    """Twelve letters for settings that JSON can hold: equal for equal ones, whatever the order of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
