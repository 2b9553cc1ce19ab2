"""A part of a source, chosen at random."""

import heapq
from collections.abc import Iterator
from dataclasses import replace

from open_gem.label.done import HashedIdSet, key
from open_gem.label.paths import PassedOver
from open_gem.label.reading import Item
from open_gem.label.sources import Source


def sample(source: Source, count: int, seed: int = 0) -> Source:
    """Return `count` images of a source, or all if there are fewer, as a source: those whose ids have the lowest hashes
    with `seed`.

    They do not depend on the order of the listing, and a larger count adds to them. Each listing of them lists the
    whole source, and keeps eight bytes of each id.
    """

    def listing(passed_over: PassedOver) -> Iterator[Item]:
        seen = HashedIdSet()
        distinct = (pair for pair in enumerate(source.items(passed_over)) if seen.add(pair[1].id))
        chosen = heapq.nsmallest(count, distinct, key=lambda pair: key(f"{seed}/{pair[1].id}"))
        yield from (item for _, item in sorted(chosen, key=lambda pair: pair[0]))  # as listed: tars are read forwards

    return replace(source, listing=listing)
