"""Splits: the sets of exported images, such as train, val and test."""

import hashlib
import re
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from open_gem.checks import did_you_mean, is_count, is_positive, shown
from open_gem.errors import InputError

BY = ("image", "folder")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a file, everywhere


@dataclass(frozen=True)
class Split:
    """A rule for the set of each image. It looks at the image's id alone, so images that are added move no other.

    shares  of all images by the name of the set: above 0, of sum 1; empty: all images are one set, called ""
    by      "image", or "folder": images of one folder stay together, such as the frames of a video
    seed    another one gives other sets

    Raises InputError for settings that do not fit.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    by: str = "image"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            if not NAME.fullmatch(name):
                raise InputError(f"a set is called {shown(name)}, expected letters, digits, - and _")
            if not is_positive(share):
                raise InputError(f"the share of {name!r} is {shown(share)}, expected a number above 0")
        if self.shares and abs((total := sum(self.shares.values())) - 1) > 1e-6:
            raise InputError(f"the shares of the sets sum to {total:g}, expected 1")
        if self.by not in BY:
            raise InputError(f"cannot split by {shown(self.by)}{did_you_mean(self.by, BY)}: expected image or folder")
        if not is_count(self.seed, 0):
            raise InputError(f"the seed of the split is {shown(self.seed)}, expected a whole number of 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, in order."""
        return tuple(self.shares) or ("",)

    def of(self, image_id: str) -> str:
        """Return the set of an image."""
        key = image_id.rpartition("/")[0] if self.by == "folder" else image_id
        hashed = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        bounds = list(accumulate(self.shares.values()))[:-1]
        return self.names[bisect(bounds, int.from_bytes(hashed[:8], "big") / 2**64)]


UNSPLIT = Split()
"""All images in one set."""


def parse_split(text: str, by: str = "image", seed: int = 0) -> Split:
    """Parse "train=0.8,val=0.1,test=0.1". Raises InputError."""
    shares: dict[str, float] = {}
    for word in text.split(","):
        name, _, share = (part.strip() for part in word.partition("="))
        try:
            number = float(share)
        except ValueError:
            raise InputError(
                f"--split has {shown(word.strip())}, expected such as train=0.8,val=0.1,test=0.1"
            ) from None
        if name in shares:
            raise InputError(f"--split names {name!r} twice, expected each set once")
        shares[name] = number
    return Split(shares, by, seed)


def with_set(name: str, set_name: str) -> str:
    """Return the name of a file or folder of a set: "instances_train"; "instances" if the images are not split."""
    return f"{name}_{set_name}" if set_name else name
