"""Comparing an index with the truth, as values."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    KvSnapshot,
    Tier,
)
from services.kv_indexer.core.comparison import Held, brought_up, compare, snapshot_of

blocks = st.frozensets(st.integers(0, 9))


def held(device: Iterable[int], host: Iterable[int] = ()) -> Held:
    return {Tier.DEVICE: set(device), Tier.HOST: set(host), Tier.DISK: set()}


@given(blocks, blocks, blocks, blocks)
def test_every_block_of_a_tier_is_counted_on_one_side_or_as_equal(
    device_here: frozenset[int],
    host_here: frozenset[int],
    device_there: frozenset[int],
    host_there: frozenset[int],
) -> None:
    differences = compare(
        held(device_here, host_here), held(device_there, host_there), may_lack_blocks=0
    )
    for tier, in_index, at_worker in (
        (Tier.DEVICE, device_here, device_there),
        (Tier.HOST, host_here, host_there),
    ):
        difference = differences[tier]
        assert difference.equal_blocks == len(in_index & at_worker)
        assert difference.only_in_index == {block for block in in_index if block not in at_worker}
        assert difference.only_at_worker == {block for block in at_worker if block not in in_index}
        assert difference.evicted_blocks == 0
        assert difference.is_of_none == (not in_index and not at_worker)


def test_what_the_index_may_lack_is_evicted_and_not_different() -> None:
    difference = compare(held({1, 9}), held({1, 2, 3}), may_lack_blocks=2)[Tier.DEVICE]
    assert (difference.only_at_worker, difference.evicted_blocks) == (frozenset(), 2)
    assert difference.only_in_index == {9}


def test_an_index_that_lacks_more_than_it_may_in_all_tiers_is_different() -> None:
    differences = compare(held({1}, {4}), held({1, 2}, {4, 5}), may_lack_blocks=1)
    assert (differences[Tier.DEVICE].only_at_worker, differences[Tier.HOST].only_at_worker) == (
        {2},
        {5},
    )


def test_batches_on_their_way_are_counted_in_before_the_comparison() -> None:
    first = KvBatch(1, 5, [BlocksStored([4]), BlocksRemoved([1, 7])])
    assert brought_up(held({1, 2}), [first]) == held({2, 4})
    then = KvBatch(1, 6, [CacheCleared(), BlocksStored([8])])
    assert brought_up(held({1, 2}, {1}), [first, then]) == held({8})


def test_batches_change_the_tier_that_they_name() -> None:
    moved = KvBatch(1, 5, [BlocksStored([1], tier=Tier.HOST), BlocksRemoved([1])])
    assert brought_up(held({1, 2}), [moved]) == held({2}, {1})


def test_a_snapshot_is_compared_in_all_of_its_tiers() -> None:
    snapshot = KvSnapshot(1, 1, [1, 2], lower_tiers=[BlocksStored([2, 3], ((0, 1),), Tier.HOST)])
    assert snapshot_of(snapshot) == held({1, 2}, {2, 3})
