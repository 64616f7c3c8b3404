"""Following one worker over a transport that loses, repeats and reorders."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    KvEvent,
    KvSnapshot,
)
from services.kv_indexer.core import follower as follower_module
from services.kv_indexer.core.follower import BatchRange, Follower, RecoveryReason
from services.kv_indexer.core.index import FastestIndex

WORKER, OTHER = 1, 2


def stored(number: int, *blocks: int, epoch: int = 1) -> KvBatch:
    return KvBatch(epoch, number, [BlocksStored(blocks)])


def heartbeat(number: int, *, epoch: int = 1) -> KvBatch:
    return KvBatch(epoch, number)


class Followed:
    """A follower with its index."""

    def __init__(self, *taken: KvBatch | KvSnapshot, max_bytes: int = 1 << 30) -> None:
        self.index = FastestIndex(max_bytes)
        self.index.add(WORKER, "m", 16)
        self.index.add(OTHER, "m", 16)
        self.follower = Follower(self.index, WORKER)
        self.take(*taken)

    def take(self, *taken: KvBatch | KvSnapshot) -> None:
        for what in taken:
            match what:
                case KvBatch():
                    self.follower.take_batch(what)
                case KvSnapshot():
                    self.follower.take_snapshot(what)
            self.follower.check_invariants()
            self.index.check_invariants()

    def held(self) -> set[int]:
        return set(self.index.held(WORKER))

    def wanted(self) -> RecoveryReason | None:
        return self.follower.wanted


def test_a_worker_not_heard_of_needs_a_snapshot() -> None:
    followed = Followed()
    assert followed.wanted() is RecoveryReason.DISCOVERED
    followed.take(KvSnapshot(1, 7, [1, 2]))
    assert (followed.wanted(), followed.held()) == (None, {1, 2})


def test_a_worker_heard_from_its_first_batch_on_needs_no_snapshot() -> None:
    followed = Followed(stored(1, 1), stored(2, 2))
    assert (followed.wanted(), followed.held()) == (None, {1, 2})


def test_a_worker_that_did_nothing_yet_needs_no_snapshot() -> None:
    assert Followed(heartbeat(0)).wanted() is None


def test_a_gap_needs_a_snapshot_and_what_was_known_stays_meanwhile() -> None:
    followed = Followed(stored(1, 1), stored(3, 3))
    assert (followed.wanted(), followed.held()) == (RecoveryReason.GAP, {1})
    followed.take(KvSnapshot(1, 2, [1, 2]))
    assert (followed.wanted(), followed.held()) == (None, {1, 2, 3})


def test_batches_that_the_snapshot_has_are_not_applied_again() -> None:
    followed = Followed(stored(1, 1), stored(3, 3), KvSnapshot(1, 3, [1, 2]))
    assert (followed.wanted(), followed.held()) == (None, {1, 2})


def test_a_late_batch_that_fills_the_gap_makes_the_snapshot_unnecessary() -> None:
    followed = Followed(stored(1, 1), stored(3, 3), stored(2, 2))
    assert (followed.wanted(), followed.held()) == (None, {1, 2, 3})


def test_the_range_asked_for_is_all_that_did_not_come() -> None:
    followed = Followed(stored(1, 1), stored(3, 3), stored(5, 5), stored(6, 6))
    assert followed.follower.missing == BatchRange(epoch=1, first=2, last=4)
    assert followed.follower.missing_batches == 5
    followed.take(stored(2, 2), stored(3, 3), stored(4, 4))
    assert followed.wanted() is None
    assert followed.held() == {1, 2, 3, 4, 5, 6}


def test_a_lost_last_batch_is_the_range_asked_for() -> None:
    followed = Followed(stored(1, 1), heartbeat(2))
    assert followed.follower.missing == BatchRange(epoch=1, first=2, last=2)


def test_a_new_epoch_is_asked_for_from_its_first_batch_on() -> None:
    followed = Followed(stored(1, 1), stored(3, 5, epoch=2))
    assert followed.follower.missing == BatchRange(epoch=2, first=1, last=2)


def test_a_worker_that_was_not_followed_from_its_start_is_not_asked_for_a_range() -> None:
    assert Followed().follower.missing is None
    assert Followed(stored(7, 1)).follower.missing is None


def test_a_heartbeat_shows_that_the_last_batch_was_lost() -> None:
    followed = Followed(stored(1, 1), heartbeat(2))
    assert followed.wanted() is RecoveryReason.HEARTBEAT
    followed.take(KvSnapshot(1, 2, [1, 2]))
    assert (followed.wanted(), followed.held()) == (None, {1, 2})


def test_a_snapshot_older_than_a_known_batch_leaves_it_wanted() -> None:
    followed = Followed(stored(1, 1), heartbeat(3), KvSnapshot(1, 2, [1, 2]))
    assert (followed.wanted(), followed.held()) == (RecoveryReason.HEARTBEAT, {1, 2})


def test_a_snapshot_older_than_the_index_is_ignored() -> None:
    followed = Followed(stored(1, 1), stored(2, 2), KvSnapshot(1, 1, [1]))
    assert followed.held() == {1, 2}


def test_a_repeated_batch_changes_nothing() -> None:
    followed = Followed(stored(1, 1), KvBatch(1, 2, [BlocksRemoved([1])]), stored(1, 1))
    assert (followed.wanted(), followed.held()) == (None, set())


def test_a_new_epoch_voids_what_was_known_at_once() -> None:
    followed = Followed(stored(1, 1), stored(2, 5, epoch=2))
    assert (followed.wanted(), followed.held()) == (RecoveryReason.NEW_EPOCH, set())
    followed.take(KvSnapshot(2, 1, [4]))
    assert (followed.wanted(), followed.held()) == (None, {4, 5})


def test_what_an_older_epoch_says_is_ignored() -> None:
    followed = Followed(stored(1, 1, epoch=2), stored(2, 2, epoch=1), KvSnapshot(1, 9, [9]))
    assert (followed.wanted(), followed.held()) == (None, {1})


def test_a_cleared_cache_leaves_the_index() -> None:
    assert Followed(stored(1, 1), KvBatch(1, 2, [CacheCleared()])).held() == set()


def test_what_waits_for_a_snapshot_is_bounded() -> None:
    blocks = follower_module.MAX_KEPT_BLOCKS // 2
    followed = Followed(
        stored(2, *range(blocks)), stored(3, *range(blocks)), stored(4, 1), KvSnapshot(1, 2, [1])
    )
    # Batch 3 was still kept, batch 2 was not: the snapshot had it.
    assert (followed.wanted(), followed.follower.applied) == (None, 4)


def test_a_worker_without_room_is_degraded_until_room_was_made() -> None:
    followed = Followed(max_bytes=FastestIndex.block_bytes * 3 + FastestIndex.holders_bytes)
    followed.take(stored(1, 1, 2, 3, 4, 5))
    assert (followed.wanted(), followed.held()) == (None, {1, 2, 3})
    assert followed.follower.degraded_reason == "index_full"
    followed.take(KvBatch(1, 2, [BlocksRemoved([5, 4, 3])]))
    assert not followed.follower.degraded_reason
    followed.take(stored(3, 6, 7, 8, 9))
    followed.follower.room_was_made()
    assert followed.wanted() is RecoveryReason.ROOM
    followed.take(KvSnapshot(1, 3, [1, 2]))
    assert (followed.wanted(), followed.held()) == (None, {1, 2})
    assert not followed.follower.degraded_reason


class FakeWorker:
    """The truth, and what it says of it."""

    def __init__(self) -> None:
        self.epoch = 1
        self.number = 0
        self.held: dict[int, None] = {}
        self.batches: list[KvBatch] = []

    def change(self, events: Iterable[KvEvent]) -> KvBatch:
        taken = list(events)
        for event in taken:
            match event:
                case BlocksStored(hashes):
                    self.held.update(dict.fromkeys(hashes))
                case BlocksRemoved(hashes):
                    for block in hashes:
                        self.held.pop(block, None)
                case CacheCleared():
                    self.held.clear()
        self.number += bool(taken)
        batch = KvBatch(self.epoch, self.number, taken)
        if taken:
            self.batches.append(batch)
        return batch

    def between(self, wanted: BatchRange) -> list[KvBatch]:
        """None of an epoch that is over."""
        is_over = wanted.epoch != self.epoch
        return [] if is_over else self.batches[wanted.first - 1 : wanted.last]

    def restart(self) -> None:
        self.epoch, self.number, self.held, self.batches = self.epoch + 1, 0, {}, []

    def snapshot(self) -> KvSnapshot:
        return KvSnapshot(self.epoch, self.number, list(self.held))


blocks = st.lists(st.integers(0, 9), min_size=1, max_size=3)
events = st.one_of(
    st.builds(BlocksStored, blocks), st.builds(BlocksRemoved, blocks), st.builds(CacheCleared)
)
steps = st.one_of(
    st.lists(events, max_size=3),
    st.sampled_from(["restart", "snapshot", "quick snapshot", "range"]),
    # Deliver a message that is on its way, the first one more often than not, and perhaps keep a
    # copy of it there; or lose one.
    st.tuples(st.sampled_from(["deliver", "repeat", "lose"]), st.sampled_from([0, 0, 0, 1, 2, 5])),
)


@given(st.lists(steps, max_size=60), st.booleans())
def test_after_a_heartbeat_and_a_recovery_the_index_equals_the_truth(
    script: list[list[KvEvent] | str | tuple[str, int]], has_batches: bool
) -> None:
    worker, followed = FakeWorker(), Followed()
    on_their_way: list[KvBatch | KvSnapshot] = []
    for step in script:
        match step:
            case "restart":
                worker.restart()
            case "snapshot":
                on_their_way.append(worker.snapshot())
            case "range":
                if (missing := followed.follower.missing) is not None:
                    on_their_way.extend(worker.between(missing))
            case "quick snapshot":
                followed.take(worker.snapshot())
            case (str(fate), int(position)):
                if position < len(on_their_way):
                    message = on_their_way[position]
                    if fate != "repeat":
                        del on_their_way[position]
                    if fate != "lose":
                        followed.take(message)
            case list(changes):
                on_their_way.append(worker.change(changes))
    followed.take(worker.change([]))
    if has_batches and (missing := followed.follower.missing) is not None:
        followed.take(*worker.between(missing))
        assert followed.wanted() is None
    if followed.wanted() is not None:
        followed.take(worker.snapshot())
    assert followed.wanted() is None
    assert followed.held() == set(worker.held)
    # What comes too late does no harm.
    followed.take(*on_their_way)
    assert followed.held() == set(worker.held)
