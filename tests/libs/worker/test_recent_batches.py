"""The ring of recent batches, against a list of all that ever were."""

from hypothesis import given
from hypothesis import strategies as st

from libs.worker.core.recent_batches import BATCH_COST_BYTES, RecentBatches

SMALL_BYTES = 10 * BATCH_COST_BYTES


def test_batches_are_numbered_from_one() -> None:
    recent = RecentBatches(SMALL_BYTES)
    recent.append(b"a")
    recent.append(b"b")
    assert recent.between(1, 2) == [b"a", b"b"]
    assert recent.between(2, 2) == [b"b"]


def test_a_batch_larger_than_the_ring_leaves_it_empty_and_the_numbers_go_on() -> None:
    recent = RecentBatches(SMALL_BYTES)
    recent.append(bytes(SMALL_BYTES))
    assert recent.between(1, 1) is None
    recent.append(b"b")
    assert recent.between(2, 2) == [b"b"]


@given(st.lists(st.binary(max_size=300), max_size=40), st.integers(0, 41), st.integers(0, 41))
def test_a_range_is_there_whole_or_not_at_all(batches: list[bytes], first: int, last: int) -> None:
    recent = RecentBatches(SMALL_BYTES)
    for batch in batches:
        recent.append(batch)
    kept, size_bytes = 0, 0
    for batch in reversed(batches):
        size_bytes += len(batch) + BATCH_COST_BYTES
        if size_bytes > SMALL_BYTES:
            break
        kept += 1
    oldest = len(batches) - kept + 1
    if oldest <= first <= last <= len(batches):
        assert recent.between(first, last) == batches[first - 1 : last]
    else:
        assert recent.between(first, last) is None
