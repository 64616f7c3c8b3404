"""The ledger against a naive account of what an engine holds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from libs.common.hashing import sequence_hashes
from libs.common.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineCacheCleared,
    EngineHash,
    EngineKvEvent,
)
from libs.worker.core import numbering
from libs.worker.core.kv_ledger import KvLedger

BLOCK_SIZE_TOKENS = 2

Path = tuple[int, ...]
"""A block and all before it, one number for each block."""


def tokens(path: Path) -> list[int]:
    return [token for number in path for token in (number, 7)]


def hash_of(path: Path) -> int:
    return sequence_hashes(tokens(path), BLOCK_SIZE_TOKENS)[-1]


def engine_hash(path: Path, variant: int = 0) -> EngineHash:
    """Engines tell blocks of the same tokens apart, such as those with different images."""
    return EngineHash(bytes((variant, *path)))


def stored(path: Path, start: int = 0, variant: int = 0) -> EngineBlocksStored:
    """Blocks `start` and following of the path."""
    return EngineBlocksStored(
        tuple(engine_hash(path[: end + 1], variant) for end in range(start, len(path))),
        engine_hash(path[:start], variant) if start else None,
        tokens(path[start:]),
    )


def removed(*paths: Path, variant: int = 0) -> EngineBlocksRemoved:
    return EngineBlocksRemoved(tuple(engine_hash(path, variant) for path in paths))


def changes(batches: Iterable[KvBatch]) -> list[object]:
    return [event for batch in batches for event in batch.events]


def ledger_of(*events: EngineKvEvent) -> KvLedger:
    """A ledger whose changes so far have been cut."""
    ledger = KvLedger(BLOCK_SIZE_TOKENS, epoch=1)
    ledger.apply(events)
    ledger.cut()
    return ledger


def test_stored_blocks_are_published_under_their_sequence_hashes() -> None:
    ledger = KvLedger(BLOCK_SIZE_TOKENS, epoch=5)
    ledger.apply([stored((1, 2)), stored((1, 2, 3), start=2)])
    hashes = tuple(sequence_hashes(tokens((1, 2, 3)), BLOCK_SIZE_TOKENS))
    assert ledger.cut() == [KvBatch(5, 1, (BlocksStored(hashes),))]


def test_sequence_hashes_that_the_engine_has_are_taken_as_they_are() -> None:
    path = (1, 2, 3)
    hashes = sequence_hashes(tokens(path), BLOCK_SIZE_TOKENS)
    by_tokens, by_hashes = (KvLedger(BLOCK_SIZE_TOKENS, epoch=5) for _ in range(2))
    for start, end in ((0, 2), (2, 3)):
        event = stored(path[:end], start)
        by_tokens.apply([event])
        by_hashes.apply([replace(event, token_ids=(), sequence_hashes=hashes[start:end])])
    assert by_hashes.cut() == by_tokens.cut()
    by_hashes.apply([replace(stored((4,)), sequence_hashes=[])])
    assert by_hashes.unhashed_blocks == 1


def test_blocks_of_another_adapter_or_salt_are_other_blocks() -> None:
    ledger = KvLedger(BLOCK_SIZE_TOKENS, epoch=1)
    blocks = [
        EngineBlocksStored((EngineHash(name.encode()),), None, [1, 2], lora, salt)
        for name, lora, salt in (("a", "", ""), ("b", "x", ""), ("c", "", "x"))
    ]
    ledger.apply(blocks)
    assert ledger.published_blocks == 3


def test_a_block_is_removed_only_with_its_last_copy() -> None:
    ledger = ledger_of(stored((1,)), stored((1,)), stored((1,), variant=1))
    ledger.apply([removed((1,)), removed((1,), variant=1)])
    assert ledger.cut() == []
    ledger.apply([removed((1,))])
    assert changes(ledger.cut()) == [BlocksRemoved((hash_of((1,)),))]


def test_a_middle_block_takes_its_descendants_along_deepest_first() -> None:
    ledger = ledger_of(stored((1, 2, 3, 4)))
    ledger.apply([removed((1, 2))])
    deepest_first = tuple(hash_of(path) for path in ((1, 2, 3, 4), (1, 2, 3), (1, 2)))
    assert changes(ledger.cut()) == [BlocksRemoved(deepest_first)]


def test_a_middle_block_that_returns_brings_its_descendants_back() -> None:
    ledger = ledger_of(stored((1, 2, 3, 4)), removed((1, 2)), removed((1, 2, 3, 4)))
    ledger.apply([stored((1, 2), start=1)])
    after_first = ((0, hash_of((1,))),)
    assert changes(ledger.cut()) == [
        BlocksStored((hash_of((1, 2)), hash_of((1, 2, 3))), after_first)
    ]


def test_events_and_snapshots_tell_which_block_each_one_follows() -> None:
    ledger = ledger_of()
    ledger.apply([stored((1, 2, 3)), stored((1, 4), start=1), stored((5, 6))])
    (change,) = changes(ledger.cut())
    snapshot = ledger.snapshot()
    follows = {
        hash_of(path): hash_of(path[:-1]) if path[:-1] else None
        for path in [(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 6)]
    }
    assert isinstance(change, BlocksStored)
    for told in (change, snapshot):
        starts = dict(told.chains)
        befores = (None, *told.sequence_hashes)
        assert {
            block: starts.get(position, befores[position])
            for position, block in enumerate(told.sequence_hashes)
        } == follows


def test_a_block_that_returns_brings_back_nothing_beyond_the_next_missing_one() -> None:
    ledger = ledger_of(stored((1, 2, 3)), removed((1,), (1, 2)))
    ledger.apply([stored((1,))])
    assert changes(ledger.cut()) == [BlocksStored((hash_of((1,)),))]


def test_blocks_whose_predecessor_is_unknown_are_counted_and_left_out() -> None:
    ledger = ledger_of(stored((1, 2, 3), start=1))
    assert (ledger.unhashed_blocks, ledger.published_blocks) == (2, 0)


def test_blocks_that_are_not_full_are_counted_and_left_out() -> None:
    ledger = ledger_of(EngineBlocksStored((engine_hash((1,)),), None, [1]))
    assert (ledger.unhashed_blocks, ledger.published_blocks) == (1, 0)


def test_a_cleared_cache_outdates_the_changes_before() -> None:
    ledger = ledger_of(stored((1,)))
    ledger.apply([stored((2,)), EngineCacheCleared(), stored((3,))])
    assert changes(ledger.cut()) == [CacheCleared(), BlocksStored((hash_of((3,)),))]


def test_numbers_go_up_only_with_changes_and_a_heartbeat_repeats_the_last() -> None:
    ledger = ledger_of(stored((1,)))
    assert ledger.cut() == []
    assert ledger.heartbeat() == KvBatch(1, 1)
    ledger.apply([removed((1,))])
    assert [batch.sequence_number for batch in ledger.cut()] == [2]


def test_more_changes_than_a_message_takes_are_cut_into_several_batches() -> None:
    blocks = numbering.MAX_BATCH_BLOCKS + 1
    ledger = KvLedger(1, epoch=1)
    names = tuple(EngineHash(number.to_bytes(4)) for number in range(blocks))
    ledger.apply([EngineBlocksStored(names, None, range(blocks))])
    first, second = ledger.cut()
    assert (first.sequence_number, second.sequence_number) == (1, 2)
    assert tuple(
        block
        for event in changes([first, second])
        if isinstance(event, BlocksStored)
        for block in event.sequence_hashes
    ) == tuple(sequence_hashes(range(blocks), 1))


class NaiveEngine:
    """Copies by name; what readers may know follows from them alone."""

    def __init__(self) -> None:
        self.copies: Counter[tuple[Path, int]] = Counter()

    def store(self, path: Path, start: int, variant: int) -> None:
        if start and not self.copies[path[:start], variant]:
            return
        for end in range(start, len(path)):
            self.copies[path[: end + 1], variant] += 1

    def remove(self, path: Path, variant: int) -> None:
        if self.copies[path, variant]:
            self.copies[path, variant] -= 1

    def published(self) -> set[int]:
        held = {path for (path, _), copies in self.copies.items() if copies}
        return {
            hash_of(path) for path in held if all(path[:end] in held for end in range(1, len(path)))
        }


class StrictReader:
    """Replays batches and checks what the contract promises of their order."""

    def __init__(self, parents: dict[int, int | None]) -> None:
        self.parents = parents
        self.held: set[int] = set()

    def replay(self, batch: KvBatch) -> None:
        for event in batch.events:
            match event:
                case BlocksStored(hashes):
                    for block in hashes:
                        assert self.parents[block] is None or self.parents[block] in self.held
                        self.held.add(block)
                case BlocksRemoved(hashes):
                    for block in hashes:
                        self.held.remove(block)
                        assert not any(self.parents[other] == block for other in self.held)
                case CacheCleared():
                    self.held.clear()


paths = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
variants = st.integers(0, 1)
operations = st.one_of(
    st.tuples(st.just("store"), paths, st.integers(0, 3), variants),
    st.tuples(st.just("remove"), paths, st.just(0), variants),
    st.tuples(st.sampled_from(["cut", "cut", "clear"]), st.just((0,)), st.just(0), st.just(0)),
)
PARENTS: dict[int, int | None] = {
    hash_of(path): hash_of(path[:-1]) if path[:-1] else None
    for length in range(1, 5)
    for path in (tuple((number >> bit) & 1 for bit in range(length)) for number in range(2**length))
}


@given(st.lists(operations, max_size=40))
def test_replayed_batches_and_snapshots_equal_the_naive_account(
    script: list[tuple[str, Path, int, int]],
) -> None:
    ledger, engine, reader = (
        KvLedger(BLOCK_SIZE_TOKENS, epoch=1),
        NaiveEngine(),
        StrictReader(PARENTS),
    )
    for operation, path, start, variant in [*script, ("cut", (0,), 0, 0)]:
        match operation:
            case "store":
                start = min(start, len(path) - 1)
                ledger.apply([stored(path, start, variant)])
                engine.store(path, start, variant)
            case "remove":
                ledger.apply([removed(path, variant=variant)])
                engine.remove(path, variant)
            case "clear":
                ledger.apply([EngineCacheCleared()])
                engine.copies.clear()
            case _:
                for batch in ledger.cut():
                    reader.replay(batch)
                snapshot = ledger.snapshot()
                from_snapshot = StrictReader(PARENTS)
                from_snapshot.replay(KvBatch(1, 1, [BlocksStored(snapshot.sequence_hashes)]))
                assert reader.held == from_snapshot.held == engine.published()
                assert len(snapshot.sequence_hashes) == ledger.published_blocks
        ledger.check_invariants()
