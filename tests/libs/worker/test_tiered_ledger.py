"""The ledger of two tiers against a naive account of what an engine holds."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from libs.common.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvBatch, Tier
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineCacheCleared,
    EngineKvEvent,
)
from libs.worker.core.tiered_ledger import TieredLedger
from tests.libs.worker.test_kv_ledger import (
    BLOCK_SIZE_TOKENS,
    PARENTS,
    Path,
    changes,
    engine_hash,
    hash_of,
    paths,
    removed,
    stored,
    variants,
)


def taken_in(*paths: Path, variant: int = 0) -> EngineBlocksStored:
    """Blocks that the engine still has on the device: it names them and no more."""
    names = tuple(engine_hash(path, variant) for path in paths)
    return EngineBlocksStored(names, None, (), tier=Tier.HOST)


def dropped(*paths: Path, variant: int = 0) -> EngineBlocksRemoved:
    return EngineBlocksRemoved(removed(*paths, variant=variant).engine_hashes, Tier.HOST)


def hashes_of(*paths: Path) -> tuple[int, ...]:
    return tuple(map(hash_of, paths))


def ledger_of(*events: EngineKvEvent) -> TieredLedger:
    """A ledger whose changes so far have been cut."""
    ledger = TieredLedger(BLOCK_SIZE_TOKENS, epoch=1)
    ledger.apply(events)
    ledger.cut()
    return ledger


def test_a_block_that_moves_to_host_memory_is_told_to_be_there_before_it_leaves_the_device() -> (
    None
):
    ledger = ledger_of(stored((1, 2)))
    ledger.apply([taken_in((1, 2)), removed((1, 2))])
    moved = hashes_of((1, 2))
    assert changes(ledger.cut()) == [
        BlocksStored(moved, ((0, hash_of((1,))),), Tier.HOST),
        BlocksRemoved(moved),
    ]
    assert ledger.tier_blocks() == {Tier.DEVICE: 1, Tier.HOST: 1}


def test_host_blocks_go_before_the_device_block_that_they_follow() -> None:
    ledger = ledger_of(stored((1, 2, 3)), taken_in((1, 2), (1, 2, 3)), removed((1, 2, 3), (1, 2)))
    ledger.apply([removed((1,))])
    assert changes(ledger.cut()) == [
        BlocksRemoved(hashes_of((1, 2, 3), (1, 2)), Tier.HOST),
        BlocksRemoved(hashes_of((1,))),
    ]


def test_host_blocks_come_back_with_the_block_that_they_follow() -> None:
    ledger = ledger_of(stored((1, 2)), taken_in((1, 2)), removed((1, 2), (1,)))
    ledger.apply([stored((1,))])
    assert changes(ledger.cut()) == [
        BlocksStored(hashes_of((1,))),
        BlocksStored(hashes_of((1, 2)), ((0, hash_of((1,))),), Tier.HOST),
    ]


def test_a_host_block_that_is_on_the_device_too_leaves_those_after_it_alone() -> None:
    ledger = ledger_of(stored((1, 2)), taken_in((1,), (1, 2)), removed((1, 2)))
    ledger.apply([dropped((1,))])
    assert changes(ledger.cut()) == [BlocksRemoved(hashes_of((1,)), Tier.HOST)]


def test_a_host_block_that_the_device_never_told_of_is_known_by_its_tokens() -> None:
    ledger = ledger_of(stored((1,)))
    known = stored((1, 2), start=1)
    ledger.apply(
        [EngineBlocksStored(known.engine_hashes, known.parent, known.token_ids, tier=Tier.HOST)]
    )
    assert ledger.tier_blocks() == {Tier.DEVICE: 1, Tier.HOST: 1}
    assert ledger.unhashed_blocks == 0


def test_a_host_block_of_which_nothing_is_known_is_counted_and_not_told() -> None:
    ledger = ledger_of()
    ledger.apply([taken_in((1,)), taken_in((1, 2))])
    assert (ledger.cut(), ledger.unhashed_blocks) == ([], 2)


def test_copies_may_be_told_of_before_those_of_the_blocks_that_they_follow() -> None:
    def copy(path: Path) -> EngineBlocksStored:
        known = stored(path, start=len(path) - 1)
        return EngineBlocksStored(
            known.engine_hashes, known.parent, known.token_ids, tier=Tier.HOST
        )

    ledger = ledger_of()
    ledger.apply([copy((1, 2, 3)), copy((1, 2)), copy((4, 5)), dropped((4, 5)), copy((1,))])
    assert ledger.tier_blocks() == {Tier.DEVICE: 0, Tier.HOST: 3}
    assert ledger.unhashed_blocks == 0


def test_evictions_are_counted_by_tier() -> None:
    ledger = ledger_of(stored((1, 2)), taken_in((1,), (1, 2)), removed((1, 2), (1,)), dropped((1,)))
    assert ledger.tier_evicted_blocks() == {Tier.DEVICE: 2, Tier.HOST: 1}


class NaiveEngine:
    """Copies by tier and name; what readers may know follows from them alone."""

    def __init__(self) -> None:
        self.device: Counter[tuple[Path, int]] = Counter()
        self.host: Counter[tuple[Path, int]] = Counter()

    def published(self) -> dict[Tier, set[int]]:
        on_device = self._closed({path for (path, _), copies in self.device.items() if copies})
        in_host = {path for (path, _), copies in self.host.items() if copies}
        reachable = self._closed(on_device | in_host)
        return {
            Tier.DEVICE: set(map(hash_of, on_device)),
            Tier.HOST: set(map(hash_of, in_host & reachable)),
        }

    @staticmethod
    def _closed(held: set[Path]) -> set[Path]:
        return {path for path in held if all(path[:end] in held for end in range(1, len(path)))}


class StrictReader:
    """Replays batches and checks what the contract promises of their order."""

    def __init__(self) -> None:
        self.held: dict[Tier, set[int]] = {Tier.DEVICE: set(), Tier.HOST: set()}

    def replay(self, batch: KvBatch) -> None:
        for event in batch.events:
            match event:
                case BlocksStored(hashes, chains, tier):
                    followed = dict(chains)
                    before = None
                    for position, block in enumerate(hashes):
                        before = followed.get(position, before)
                        assert PARENTS[block] == before
                        assert block not in self.held[tier]
                        self.held[tier].add(block)
                        self.check(block, tier)
                        before = block
                case BlocksRemoved(hashes, tier):
                    for block in hashes:
                        self.held[tier].remove(block)
                        for below in self.held:
                            for other in self.held[below]:
                                self.check(other, below)
                case CacheCleared():
                    for blocks in self.held.values():
                        blocks.clear()

    def check(self, block: int, tier: Tier) -> None:
        parent = PARENTS[block]
        assert parent is None or any(
            parent in blocks for faster, blocks in self.held.items() if faster <= tier
        )


operations = st.one_of(
    st.tuples(st.just("store"), paths, st.integers(0, 3), variants),
    st.tuples(st.sampled_from(["remove", "take in", "drop"]), paths, st.just(0), variants),
    st.tuples(st.just("take in with tokens"), paths, st.integers(0, 3), variants),
    st.tuples(st.sampled_from(["cut", "cut", "clear"]), st.just((0,)), st.just(0), st.just(0)),
)


@settings(max_examples=300)
@given(st.lists(operations, max_size=60))
def test_replayed_batches_and_snapshots_equal_the_naive_account_by_tier(
    script: list[tuple[str, Path, int, int]],
) -> None:
    ledger, engine, reader = (
        TieredLedger(BLOCK_SIZE_TOKENS, epoch=1),
        NaiveEngine(),
        StrictReader(),
    )
    for operation, path, start, variant in [*script, ("cut", (0,), 0, 0)]:
        start = min(start, len(path) - 1)
        name, parent = (path, variant), (path[:start], variant)
        match operation:
            case "store":
                ledger.apply([stored(path, start, variant)])
                if not start or engine.device[parent]:
                    engine.device.update(
                        (path[: end + 1], variant) for end in range(start, len(path))
                    )
            case "remove":
                ledger.apply([removed(path, variant=variant)])
                engine.device[name] -= min(1, engine.device[name])
            case "take in":
                ledger.apply([taken_in(path, variant=variant)])
                engine.host[name] += bool(engine.device[name] or engine.host[name])
            case "take in with tokens":
                known = stored(path, start, variant)
                event = EngineBlocksStored(
                    known.engine_hashes, known.parent, known.token_ids, tier=Tier.HOST
                )
                ledger.apply([event])
                is_parent_known = not start or engine.device[parent] or engine.host[parent]
                names = [(path[: end + 1], variant) for end in range(start, len(path))]
                if is_parent_known or all(engine.device[it] or engine.host[it] for it in names):
                    engine.host.update(names)
            case "drop":
                ledger.apply([dropped(path, variant=variant)])
                engine.host[name] -= min(1, engine.host[name])
            case "clear":
                ledger.apply([EngineCacheCleared()])
                engine = NaiveEngine()
            case _:
                for batch in ledger.cut():
                    reader.replay(batch)
                snapshot = ledger.snapshot()
                from_snapshot = StrictReader()
                device = BlocksStored(snapshot.sequence_hashes, snapshot.chains)
                from_snapshot.replay(KvBatch(1, 1, [device, *snapshot.lower_tiers]))
                assert reader.held == from_snapshot.held == engine.published()
                assert ledger.tier_blocks() == {
                    tier: len(blocks) for tier, blocks in engine.published().items()
                }
        ledger.check_invariants()
