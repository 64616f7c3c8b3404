"""The host tier, by itself and below a device's pool, against naive ones."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.common.hashing import sequence_hashes
from libs.common.kv_events import Tier
from libs.engine.interface import EngineBlocksRemoved, EngineBlocksStored, EngineHash
from libs.engine.sim.core.host_tier import HostLink, HostTier, TieredPool
from libs.engine.sim.core.pool import engine_hash

BLOCK_SIZE_TOKENS = 1


def names(*blocks: int) -> tuple[EngineHash, ...]:
    return tuple(map(engine_hash, blocks))


def host_of(total_blocks: int, *blocks: int) -> HostTier:
    host = HostTier(total_blocks)
    for name in names(*blocks):
        host.take_in(name)
    host.take_events()
    return host


def test_the_block_unused_for_longest_makes_room_for_another() -> None:
    host = host_of(2, 1, 2)
    host.take_in(engine_hash(1))
    host.take_in(engine_hash(3))
    assert set(host.readers()) == set(names(1, 3))
    assert host.take_events() == [
        EngineBlocksRemoved(names(2), Tier.HOST),
        EngineBlocksStored(names(3), None, (), tier=Tier.HOST),
    ]


def test_a_block_that_is_being_read_stays() -> None:
    host = host_of(1, 1)
    host.begin_read(names(1))
    host.take_in(engine_hash(2))
    assert set(host.readers()) == set(names(1))
    host.end_read(names(1))
    host.take_in(engine_hash(2))
    assert set(host.readers()) == set(names(2))


def test_a_prefix_ends_at_the_first_block_that_is_not_there() -> None:
    host = host_of(8, 1, 2, 4)
    assert host.prefix([1, 2, 3, 4], 0, 4) == list(names(1, 2))
    assert host.prefix([1, 2, 3, 4], 1, 2) == list(names(2))
    assert host.prefix([1, 2, 3, 4], 2, 4) == []


def test_what_the_device_evicts_is_in_host_memory_before_it_is_gone() -> None:
    host = HostTier(2)
    pool = TieredPool(2, BLOCK_SIZE_TOKENS, host)
    assert pool.acquire((), 2)
    pool.publish([1, 2], 0, 2, [1, 2], "")
    pool.release([1, 2], 0)
    pool.take_events()
    assert pool.acquire((), 2)
    assert pool.take_events() == [
        EngineBlocksStored(names(2, 1), None, (), tier=Tier.HOST),
        EngineBlocksRemoved(names(2, 1)),
    ]


def test_loads_come_one_after_another() -> None:
    link = HostLink(2.0)
    assert link.load(3, now=10.0) == 16.0
    assert link.load(1, now=11.0) == 18.0
    assert link.load(1, now=30.0) == 32.0


class Naive:
    """Two lists, least recently used first, and nothing else."""

    def __init__(self, device_blocks: int, host_blocks: int) -> None:
        self.sizes = {Tier.DEVICE: device_blocks, Tier.HOST: host_blocks}
        self.device: list[int] = []
        self.host: list[int] = []
        self.in_use: list[list[int]] = []
        self.reading: list[list[int]] = []

    def is_used(self, block: int) -> bool:
        return any(block in held for held in self.in_use)

    def make_room(self, blocks: int) -> bool:
        used = {block for held in self.in_use for block in held}
        if len(used) + blocks > self.sizes[Tier.DEVICE]:
            return False
        while len(self.device) + blocks > self.sizes[Tier.DEVICE]:
            block = next(block for block in self.device if block not in used)
            self.device.remove(block)
            self.take_in(block)
        return True

    def take_in(self, block: int) -> None:
        read = {block for blocks in self.reading for block in blocks}
        if block in self.host:
            if block not in read:
                self.host.remove(block)
                self.host.append(block)
            return
        if len(self.host) == self.sizes[Tier.HOST]:
            idle = [each for each in self.host if each not in read]
            if not idle:
                return
            self.host.remove(idle[0])
        self.host.append(block)

    def end_read(self, blocks: list[int]) -> None:
        """What was to be read was wanted, whether or not it could be: its first block last."""
        self.reading.remove(blocks)
        read = {block for others in self.reading for block in others}
        for block in reversed(blocks):
            if block not in read:
                self.host.remove(block)
                self.host.append(block)


class TieredMachine(RuleBasedStateMachine):
    """Sequences of up to four blocks with common prefixes, on a device that holds six of them."""

    def __init__(self) -> None:
        super().__init__()
        self.host = HostTier(5)
        self.pool = TieredPool(6, BLOCK_SIZE_TOKENS, self.host)
        self.naive = Naive(6, 5)
        self.told: dict[Tier, set[EngineHash]] = {Tier.DEVICE: set(), Tier.HOST: set()}
        self.parents: dict[EngineHash, EngineHash | None] = {}
        self.loads: list[tuple[list[int], list[int]]] = []
        """Sequences that wait for their blocks, and those blocks."""

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def run(self, prompt: list[int]) -> None:
        """Admits a sequence; what is in host memory is being loaded from then on, what is nowhere
        is computed at once."""
        hashes = sequence_hashes(prompt, BLOCK_SIZE_TOKENS)
        for before, block in zip([None, *hashes], hashes, strict=False):
            self.parents[engine_hash(block)] = None if before is None else engine_hash(before)
        cached = self.pool.cached_prefix(hashes, len(hashes))
        coming = self.host.prefix(hashes, cached, len(hashes))
        naive_cached = next(
            (at for at, block in enumerate(hashes) if block not in self.naive.device), len(hashes)
        )
        naive_coming = []
        for block in hashes[naive_cached:]:
            if block not in self.naive.host:
                break
            naive_coming.append(block)
        assert (cached, coming) == (naive_cached, list(names(*naive_coming)))
        end = cached + len(coming) if coming else len(hashes)
        self.host.begin_read(coming)
        self.naive.reading.append(naive_coming)
        self.naive.in_use.append(hashes[:cached])
        has_room = self.pool.acquire(hashes[:cached], end - cached)
        # Blocks that are being loaded or computed take room before they have names.
        under_way = sum(len(blocks) for _, blocks in self.loads)
        assert has_room == self.naive.make_room(under_way + end - cached)
        if not has_room:
            self.host.end_read(coming)
            self.naive.end_read(naive_coming)
            self.naive.in_use.remove(hashes[:cached])
        elif coming:
            self.loads.append((hashes[:end], naive_coming))
        else:
            self.naive.reading.remove([])
            self.naive.in_use.remove(hashes[:cached])
            self._publish(hashes, cached, end)

    @precondition(lambda self: self.loads)
    @rule(index=st.integers(0, 10))
    def end_a_load(self, index: int) -> None:
        hashes, loaded = self.loads.pop(index % len(self.loads))
        self.host.end_read(names(*loaded))
        self.naive.end_read(loaded)
        first = len(hashes) - len(loaded)
        self.naive.in_use.remove(hashes[:first])
        self._publish(hashes, first, len(hashes))

    def _publish(self, hashes: list[int], first: int, end: int) -> None:
        self.pool.publish(hashes, first, end, hashes, "")
        self.naive.in_use.append(hashes[:end])
        self.naive.device += [
            block for block in hashes[first:end] if block not in self.naive.device
        ]

    @precondition(lambda self: len(self.naive.in_use) > len(self.loads))
    @rule(index=st.integers(0, 10))
    def end(self, index: int) -> None:
        loading = [hashes[: len(hashes) - len(loaded)] for hashes, loaded in self.loads]
        running = list(self.naive.in_use)
        for hashes in loading:
            running.remove(hashes)
        hashes = running[index % len(running)]
        self.naive.in_use.remove(hashes)
        self.pool.release(hashes, 0)
        for block in reversed(hashes):
            if not self.naive.is_used(block):
                self.naive.device.remove(block)
                self.naive.device.append(block)

    @invariant()
    def both_hold_the_same(self) -> None:
        self.pool.check_invariants()
        self.host.check_invariants()
        assert set(self.pool.holders()) == set(self.naive.device)
        assert set(self.host.readers()) == set(names(*self.naive.host))

    @invariant()
    def holding_a_block_somewhere_implies_holding_all_before_it(self) -> None:
        device, host = set(names(*self.naive.device)), set(names(*self.naive.host))
        assert all(self.parents[block] in {None, *device} for block in device)
        assert all(self.parents[block] in {None, *device, *host} for block in host)

    @invariant()
    def events_tell_what_is_held_where(self) -> None:
        for event in self.pool.take_events():
            assert isinstance(event, EngineBlocksStored | EngineBlocksRemoved)
            blocks = set(event.engine_hashes)
            if isinstance(event, EngineBlocksStored):
                assert not blocks & self.told[event.tier]
                if not event.token_ids:
                    # Whoever hears of it knows it from the device, where it is still.
                    assert blocks <= self.told[Tier.DEVICE]
                self.told[event.tier] |= blocks
            else:
                assert blocks <= self.told[event.tier]
                self.told[event.tier] -= blocks
        assert self.told == {
            Tier.DEVICE: set(names(*self.naive.device)),
            Tier.HOST: set(names(*self.naive.host)),
        }


TestTieredPool = TieredMachine.TestCase
TestTieredPool.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
