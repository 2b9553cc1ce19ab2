"""Text embeddings on disk, so that a long list of prompts is encoded once and not again by the next run."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from open_gem.files import cache_folder

LIMIT = 2**30  # bytes of all files together; the least recently used go first
ASKED = 500  # prompts a query


class TextStore:
    """Embeddings by prompt, in an SQLite file of the user's cache folder.

    depends  everything that embeddings depend on but the prompt: each has a file of its own
    like     an embedding `(e,)`, of the type and on the device of all

    Nothing raises: what cannot be read is not known, what cannot be written is not kept, and a store that failed once
    is left alone.
    """

    def __init__(self, depends: Sequence[bytes], like: Tensor):
        digest = hashlib.sha256()
        for part in (*depends, f"{like.dtype} {len(like)}".encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
        folder = cache_folder()
        self.path = None if folder is None else folder / "texts" / f"{digest.hexdigest()[:24]}.sqlite"
        self._like = like

    def load(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings that are known, each `(e,)`."""
        known: dict[str, Tensor] = {}
        length = self._like.numel() * self._like.element_size()

        def read(database: sqlite3.Connection) -> None:
            for start in range(0, len(prompts), ASKED):
                asked = prompts[start : start + ASKED]
                marks = ",".join("?" * len(asked))
                for prompt, row, check in database.execute(f"SELECT * FROM texts WHERE prompt IN ({marks})", asked):
                    if len(row) == length and crc32(row) == check:
                        values = torch.frombuffer(bytearray(row), dtype=self._like.dtype)
                        known[prompt] = values.to(self._like.device)

        if self.path is not None and self.path.exists():
            self._use(read)
        return known

    def save(self, rows: Mapping[str, Tensor]) -> None:
        """Keep embeddings `(e,)` by prompt."""
        content = ((prompt, row.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for prompt, row in rows.items())
        entries = ((prompt, row, crc32(row)) for prompt, row in content)
        self._use(lambda database: database.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", entries))

    def _use(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do `work` in a transaction on the file, which is made where there is none and removed where it is broken."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=5)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS texts (prompt TEXT PRIMARY KEY, row BLOB, crc INTEGER)")
                work(database)
            os.utime(self.path)
            _evict(self.path)
        except (OSError, sqlite3.OperationalError):  # locked, not writable, no space
            self.path = None
        except sqlite3.DatabaseError:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def _evict(newest: Path) -> None:
    """Remove files that were not used for longest until all have at most `LIMIT` bytes, but not the `newest`."""
    files = sorted(newest.parent.glob("*.sqlite"), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size > LIMIT and path != newest:
            size -= path.stat().st_size
            path.unlink()
