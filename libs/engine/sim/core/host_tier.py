"""Which KV blocks are kept in host memory, below the device's pool.

A block that the device evicts is taken in, and stays until its room is needed: the least recently
used goes first. A prompt whose blocks are here loads them back instead of computing them, and they
stay here too. Taking in costs no time, as the copy is made beside the steps; loading takes what
HostLink says.

Together with the device's pool the promise of `pool` holds: having a block, here or there, implies
having all before it. Blocks arrive in the order in which the device evicts them and are used again
last one first, so whatever follows a block here is older than the block, unless that is on the
device or in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from libs.common.kv_events import Tier
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineHash,
    EngineKvEvent,
)
from libs.engine.sim.core.pool import BlockPool, engine_hash


class HostTier:
    """Blocks in host memory, by the engine's names."""

    def __init__(self, total_blocks: int) -> None:
        self.total_blocks = total_blocks
        self._readers: dict[EngineHash, int] = {}
        """How many loads read each block now."""
        self._idle: OrderedDict[EngineHash, None] = OrderedDict()
        """Those that none reads, next to be dropped first."""
        self._events: list[EngineKvEvent] = []
        self._changed: list[EngineHash] = []
        """Not yet in `_events`, to report neighbours together: taken in, or dropped."""
        self._is_taking_in = False

    def take_in(self, block: EngineHash) -> None:
        """Keeps a block that the device is about to drop, unless all room is being read."""
        if block in self._readers:
            if block in self._idle:
                self._idle.move_to_end(block)
            return
        if len(self._readers) == self.total_blocks:
            if not self._idle:
                return
            oldest, _ = self._idle.popitem(last=False)
            del self._readers[oldest]
            self._note(oldest, is_taking_in=False)
        self._readers[block] = 0
        self._idle[block] = None
        self._note(block, is_taking_in=True)

    def prefix(self, hashes: Sequence[int], first: int, end: int) -> list[EngineHash]:
        """The blocks that are here of a sequence's from `first` on, to before `end` at most and up
        to the first one that is not."""
        found: list[EngineHash] = []
        for sequence_hash in hashes[first:end]:
            block = engine_hash(sequence_hash)
            if block not in self._readers:
                break
            found.append(block)
        return found

    def begin_read(self, blocks: Sequence[EngineHash]) -> None:
        """Keeps blocks from being dropped until `end_read`."""
        for block in blocks:
            if not self._readers[block]:
                del self._idle[block]
            self._readers[block] += 1

    def end_read(self, blocks: Sequence[EngineHash]) -> None:
        """`blocks` is in the sequence's order."""
        for block in reversed(blocks):
            self._readers[block] -= 1
            if not self._readers[block]:
                self._idle[block] = None

    def take_events(self) -> list[EngineKvEvent]:
        """What happened since the last call, in order."""
        self._flush()
        events, self._events = self._events, []
        return events

    def _note(self, block: EngineHash, *, is_taking_in: bool) -> None:
        if is_taking_in != self._is_taking_in:
            self._flush()
            self._is_taking_in = is_taking_in
        self._changed.append(block)

    def _flush(self) -> None:
        if not self._changed:
            return
        blocks = tuple(self._changed)
        self._changed.clear()
        self._events.append(
            EngineBlocksStored(blocks, None, (), tier=Tier.HOST)
            if self._is_taking_in
            else EngineBlocksRemoved(blocks, tier=Tier.HOST)
        )

    def check_invariants(self) -> None:
        """For tests."""
        assert len(self._readers) <= self.total_blocks
        assert set(self._idle) == {block for block, readers in self._readers.items() if not readers}

    def readers(self) -> dict[EngineHash, int]:
        """How many loads read each block now. For tests."""
        return dict(self._readers)


class TieredPool(BlockPool):
    """A device's pool that gives what it evicts to a host tier."""

    def __init__(self, total_blocks: int, block_size_tokens: int, host: HostTier) -> None:
        super().__init__(total_blocks, block_size_tokens)
        self._host = host

    def _evict(self, blocks: int) -> None:
        kept = len(self._evicted)
        super()._evict(blocks)
        for block in self._evicted[kept:]:
            self._host.take_in(block)

    def _flush_evicted(self) -> None:
        # Before they are said to be gone from the device: nobody is to think them gone altogether.
        self._events += self._host.take_events()
        super()._flush_evicted()


class HostLink:
    """The way between host memory and the device: one load after another."""

    def __init__(self, seconds_per_block: float) -> None:
        self._seconds_per_block = seconds_per_block
        self._free_at = 0.0

    def load(self, blocks: int, now: float) -> float:
        """When so many blocks will be there that are asked for now."""
        self._free_at = max(self._free_at, now) + blocks * self._seconds_per_block
        return self._free_at
