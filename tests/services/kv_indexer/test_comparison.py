"""Comparing an index with the truth, as values."""

from hypothesis import given
from hypothesis import strategies as st

from libs.common.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch, Tier
from services.kv_indexer.core.comparison import brought_up, compare

blocks = st.frozensets(st.integers(0, 9))


@given(blocks, blocks)
def test_every_block_is_counted_on_one_side_or_as_equal(
    in_index: frozenset[int], at_worker: frozenset[int]
) -> None:
    difference = compare(in_index, at_worker, may_lack_blocks=0)
    assert difference.equal_blocks == len(in_index & at_worker)
    assert difference.only_in_index == {block for block in in_index if block not in at_worker}
    assert difference.only_at_worker == {block for block in at_worker if block not in in_index}
    assert difference.evicted_blocks == 0


def test_what_the_index_may_lack_is_evicted_and_not_different() -> None:
    difference = compare({1, 9}, {1, 2, 3}, may_lack_blocks=2)
    assert (difference.only_at_worker, difference.evicted_blocks) == (frozenset(), 2)
    assert difference.only_in_index == {9}


def test_an_index_that_lacks_more_than_it_may_is_different() -> None:
    difference = compare({1}, {1, 2, 3}, may_lack_blocks=1)
    assert (difference.only_at_worker, difference.evicted_blocks) == ({2, 3}, 0)


def test_batches_on_their_way_are_counted_in_before_the_comparison() -> None:
    first = KvBatch(1, 5, [BlocksStored([4]), BlocksRemoved([1, 7])])
    assert brought_up({1, 2}, [first]) == {2, 4}
    assert brought_up({1, 2}, [first, KvBatch(1, 6, [CacheCleared(), BlocksStored([8])])]) == {8}


def test_batches_of_slower_tiers_are_left_out_as_snapshots_leave_them_out() -> None:
    slower = KvBatch(1, 5, [BlocksStored([4], tier=Tier.HOST), BlocksRemoved([1], Tier.HOST)])
    assert brought_up({1, 2}, [slower]) == {1, 2}
