"""Built-in images to try: scenes that the embedded model was not trained on."""

import io
from functools import lru_cache

from PIL import Image

from open_gem.data.scenes import HELD_OUT, scene

SIZE = (384, 512)  # pixels, height before width
SAMPLES = {"sample-1": 0, "sample-2": 1, "sample-3": 2, "sample-4": 3, "sample-5": 4, "sample-6": 5}
"""Names -> seeds of held-out scenes."""


def labels(name: str) -> list[str]:
    """Return the names of a sample's objects."""
    return _sample(name)[0]


def png(name: str) -> bytes:
    return _sample(name)[1]


@lru_cache(maxsize=len(SAMPLES))
def _sample(name: str) -> tuple[list[str], bytes]:
    drawn = scene(HELD_OUT + SAMPLES[name], SIZE)
    file = io.BytesIO()
    Image.fromarray(drawn.image).save(file, format="PNG")
    return list(drawn.names), file.getvalue()
