"""Returns free memory to the system: glibc keeps what images of many sizes have left, in many places."""

import asyncio
import ctypes
import sys
from collections.abc import Callable

ARENAS = 2  # heaps of glibc for all threads; by default it makes up to eight per core
M_ARENA_MAX = -8  # of mallopt(3)
TRIM_SECONDS = 5.0  # seconds between two trims


def limit_arenas() -> None:
    """Let threads share a few heaps, if the C library is glibc. Call it before threads are started."""
    if (mallopt := _function("mallopt")) is not None:
        mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Give free memory back to the system, if the C library is glibc."""
    if (malloc_trim := _function("malloc_trim")) is not None:
        malloc_trim(0)


async def keep_trimmed(count: Callable[[], int]) -> None:
    """Trim repeatedly, whenever `count()` has changed."""
    last = count()
    while True:
        await asyncio.sleep(TRIM_SECONDS)
        if (now := count()) != last:
            last = now
            await asyncio.to_thread(trim)


def _function(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)  # other C libraries have none of these
