"""Limits of a server: one value, made once."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.method.table import Method, find_method
from open_gem.refine import Refinement
from open_gem.serve.label_studio import Source

MIB = 2**20
NONE = "none"  # the refinement that leaves maps as they are
OWN = ("max_queue", "max_batch", "max_values", "max_bodies", "max_patches")  # limits of no single request
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits of a server. A request beyond one of them gets an error that names it.

    token          clients must send it as `Authorization: Bearer`; None: no token
    hosts          names that a request's Host header may have; None: any. On a loopback address these are its own
                   names, so that no page on the web reaches the server through a name of its own (DNS rebinding)
    origins        of pages of other sites that may ask, such as "https://example.com"
    cache_bytes    of uploaded images as the model sees them; the least recently used go first
    max_queue      pending requests, waiting or worked on; further ones get HTTP 429
    max_batch      images, or 32 times as many prompts, that the model sees at a time
    max_body       bytes of a form, which can hold image files
    max_json       bytes of any other request: JSON, with images in base64 of up to three quarters of this
    max_values     values in a JSON document, judged by its punctuation before it is parsed
    max_bodies     bytes of all pending requests
    max_pixels     of an uploaded image, by its header
    max_patches    patches that the model may see of an image, by its header; attention costs their square.
                   None: six times those of a square image, so that a strip may be six times as long as high
    max_map_pixels pixels of an image times prompts whose places (boxes, points, masks) are asked for at once; the scale
                   "probability" counts them twice, several methods once each
    max_refined_pixels
                   the same with a refinement, which works on each pixel a hundred times
    max_prompts    prompts of a request
    max_prompt     characters of a prompt
    max_files      images of a batch
    max_methods    methods of a request
    body_seconds   timeout for receiving a request
    seconds        timeout for answering it, once received
    decode_seconds timeout for decoding an image
    stop_seconds   time for pending requests when the server is stopped; then `open-gem serve` ends its process
    threads        threads that decode images and make masks
    methods        methods that encode an upload at once, beside the default; others run on first request. "clip" is the
                   host's own forward pass and costs nothing beside another
    served         methods that requests may choose, by name, with settings or names of `METHODS`; the first is the
                   default. None: all of `METHODS` and `GRADIENTS`, by default the localizer's own
    refinements    refinements that requests may choose by name, beside the localizer's own and "none" (None); the first
                   is the default if the localizer has none of its own
    label_studio   the Label Studio whose images may be fetched to predict its tasks; None: only data: URIs
    formats        accepted formats of images, as PIL calls them

    Raises InputError for an invalid limit, MethodError for an unknown method.
    """

    token: str | None = None
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    cache_bytes: int = 512 * MIB
    max_queue: int = 32
    max_batch: int = 8
    max_body: int = 32 * MIB
    max_json: int = 8 * MIB
    max_values: int = 200_000
    max_bodies: int = 256 * MIB
    max_pixels: int = 40_000_000
    max_patches: int | None = None
    max_map_pixels: int = 320_000_000
    max_refined_pixels: int = 8_000_000
    max_prompts: int = 64
    max_prompt: int = 500
    max_files: int = 16
    max_methods: int = 4
    body_seconds: float = 30.0
    seconds: float = 60.0
    decode_seconds: float = 10.0
    stop_seconds: float = 10.0
    threads: int = 2
    methods: tuple[str, ...] = ("gem", "clip")
    served: Mapping[str, str | Method] | None = None
    refinements: Mapping[str, Refinement | None] | None = None
    label_studio: Source | None = None
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            counts = field.type is int or (field.name == "max_patches" and value is not None)
            if counts and not is_count(value):
                raise InputError(f"{field.name} is {value!r}, expected a whole number of 1 or more")
            if field.type is float and not is_positive(value):
                raise InputError(f"{field.name} is {value!r}, expected a number above 0")
        for name in self.methods:
            if name not in (self.served or ()):
                find_method(name)
        if self.served is not None and not self.served:
            raise InputError("no method is served, expected one or several, or None for all")
        for origin in self.origins:
            if not re.fullmatch(r"https?://[^/?#@\s*]+", origin):
                raise InputError(f"origin {origin!r}: expected scheme and host alone, such as https://example.com")
        if self.token is not None and not _is_token(self.token):
            raise InputError("the token has spaces or letters that no header can carry, expected plain ASCII")

    def limits(self) -> dict[str, Any]:
        """Return the limits that a client can exceed."""
        names = [field.name for field in fields(self) if field.name.startswith("max_") and field.name not in OWN]
        return {name: getattr(self, name) for name in (*names, "seconds")} | {"formats": list(self.formats)}


def _is_token(text: str) -> bool:
    return bool(text) and all("!" <= letter <= "~" for letter in text)


def hosts_of(host: str) -> tuple[str, ...] | None:
    """Return the names that a server at `host` answers to: those of this machine on a loopback address, otherwise
    any."""
    return LOOPBACK if host in LOOPBACK else None


def seconds_to_wait(seconds: float) -> str:
    """Return the value of Retry-After: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))
