"""A part of a source first: the limit, and samples that do not depend on how images are listed."""

import tracemalloc
from collections.abc import Iterator

import pytest

from open_gem.label.done import WHOLE, HashedIdSet, Shard, Tally
from open_gem.label.local import pending
from open_gem.label.paths import PassedOver
from open_gem.label.sampling import sample
from open_gem.label.sources import Item, Source

IDS = [f"{number}.png" for number in range(1000)]


def source_of(ids: list[str]) -> Source:
    return Source("list", None, lambda passed_over: (Item(id, f"/in/{id}") for id in ids))


def sampled(ids: list[str], count: int, seed: int = 0) -> list[str]:
    return [item.id for item in sample(source_of(ids), count, seed).items()]


def test_a_sample_is_the_same_for_the_same_seed_in_any_order():
    chosen = sampled(IDS, 50)
    assert len(set(chosen)) == 50
    assert chosen == sorted(chosen, key=IDS.index), "they come as they are listed"
    assert set(sampled(IDS[::-1], 50)) == set(chosen) != set(sampled(IDS, 50, seed=1))
    assert set(chosen) < set(sampled(IDS, 100)), "a larger one adds to it"
    assert sampled(IDS[:3] * 2, 50) == IDS[:3], "an id that is listed twice is an image"


def test_samples_are_random():
    """Each half of the source has its share, and so has each shard: five deviations of a hypergeometric draw."""
    chosen = sampled(IDS, 400)
    assert abs(sum(IDS.index(id) < 500 for id in chosen) - 200) < 5 * 7.8
    assert abs(sum(Shard(0, 2).has(id) for id in chosen) - 200) < 5 * 7.8


def test_a_sample_of_many_images_takes_little_memory():
    def many(passed_over: PassedOver) -> Iterator[Item]:
        return (Item(f"{number:0200}", f"/in/{number:0200}") for number in range(20_000))

    tracemalloc.start()
    assert len(list(sample(Source("list", None, many), 10).items())) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # half a megabyte of buckets; all ids alone would be 5 MB


def left(limit: int | None, done: list[str], shard: Shard = WHOLE) -> tuple[list[str], Tally]:
    tally = Tally()
    items = list(pending(source_of(IDS[:10]).items(), HashedIdSet(done), shard, tally, limit))
    return [item.id for item in items], tally


def test_the_limit_is_of_new_images():
    ids, tally = left(3, IDS[:2])
    assert ids == IDS[2:5]
    assert (tally.done, tally.is_limited, tally.is_whole) == (2, True, False)
    ids, tally = left(8, IDS[:2])
    assert ids == IDS[2:10]
    assert (tally.is_limited, tally.is_whole) == (False, True), "it was just enough"


@pytest.mark.parametrize("limit", [1, 2, 5, 7])
def test_shards_share_the_limit(limit):
    shards = [Shard(index, 3) for index in range(3)]
    assert sum(shard.share(limit) or 0 for shard in shards) == limit
    assert [shard.share(None) for shard in shards] == [None] * 3
