"""Who uses which KV blocks of a device.

A block is free, private to one sequence (it is partly filled, or still being filled), or cached:
full, named by its sequence hash, shared by any number of sequences, and kept after the last of them
until its room is needed.

    total = free + private + cached,   cached = held + idle
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineHash,
    EngineKvEvent,
)


def engine_hash(sequence_hash: int) -> EngineHash:
    """This engine names a block by its sequence hash, big-endian."""
    return EngineHash(sequence_hash.to_bytes(8, "big"))


class BlockPool:
    """Block accounting with prefix reuse and eviction, least recently used first.

    Caching a block implies caching all before it. No tree is needed for that: whoever holds a block
    holds all before it too, and `release` idles blocks last one first, so in the order of idling a
    block always comes before the one it follows.
    """

    def __init__(self, total_blocks: int, block_size_tokens: int) -> None:
        self.total_blocks = total_blocks
        self._block_size_tokens = block_size_tokens
        self._free = total_blocks
        self._private = 0
        self._holders: dict[int, int] = {}
        """How many sequences hold each cached block."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody holds, next to be evicted first."""
        self._events: list[EngineKvEvent] = []
        self._evicted: list[EngineHash] = []
        """Not yet in `_events`, to report neighbours together."""

    @property
    def private_blocks(self) -> int:
        return self._private

    @property
    def active_blocks(self) -> int:
        """Private and held ones: what cannot be given to others now."""
        return self.total_blocks - self._free - len(self._idle)

    def cached_prefix(self, hashes: Sequence[int], at_most: int) -> int:
        """How many leading blocks are cached."""
        for index, block in enumerate(hashes[:at_most]):
            if block not in self._holders:
                return index
        return min(at_most, len(hashes))

    def acquire(self, cached: Sequence[int], private_blocks: int) -> bool:
        """Holds a cached prefix and takes private blocks beside it.

        False, and nothing has changed, when that does not fit.
        """
        revived = sum(1 for block in cached if block in self._idle)
        if private_blocks > self._free + len(self._idle) - revived:
            return False
        for block in cached:
            self._hold(block)
        self._evict(private_blocks - self._free)
        self._free -= private_blocks
        self._private += private_blocks
        return True

    def publish(
        self, hashes: Sequence[int], first: int, end: int, tokens: Sequence[int], cache_salt: str
    ) -> None:
        """Turns a sequence's private blocks from `first` to before `end` into cached ones it holds.

        `hashes` and `tokens` are the sequence's from its start; it holds the blocks before `first`.
        Where another sequence has published the same block already, that one is shared and the
        private one is freed.
        """
        self._private -= end - first
        fresh = first
        while fresh < end and hashes[fresh] in self._holders:
            self._hold(hashes[fresh])
            self._free += 1
            fresh += 1
        if fresh == end:
            return
        stored = hashes[fresh:end]
        self._holders.update(dict.fromkeys(stored, 1))
        self._flush_evicted()
        size = self._block_size_tokens
        self._events.append(
            EngineBlocksStored(
                engine_hashes=tuple(map(engine_hash, stored)),
                parent=engine_hash(hashes[fresh - 1]) if fresh else None,
                token_ids=tokens[fresh * size : end * size],
                cache_salt=cache_salt,
                sequence_hashes=stored,
            )
        )

    def release(self, held: Sequence[int], private_blocks: int) -> None:
        """Gives back all that a sequence has. `held` is in the sequence's order."""
        self._private -= private_blocks
        self._free += private_blocks
        holders, idle = self._holders, self._idle
        for block in reversed(held):
            left = holders[block] = holders[block] - 1
            if not left:
                idle[block] = None

    def take_events(self) -> list[EngineKvEvent]:
        """What happened to the cache since the last call, in order."""
        self._flush_evicted()
        events, self._events = self._events, []
        return events

    def _hold(self, block: int) -> None:
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def _evict(self, blocks: int) -> None:
        if blocks <= 0:
            return
        holders, idle = self._holders, self._idle
        gone = [idle.popitem(last=False)[0] for _ in range(blocks)]
        for block in gone:
            del holders[block]
        self._free += blocks
        self._evicted.extend(map(engine_hash, gone))

    def _flush_evicted(self) -> None:
        if self._evicted:
            self._events.append(EngineBlocksRemoved(tuple(self._evicted)))
            self._evicted.clear()

    def check_invariants(self) -> None:
        """For tests."""
        assert self._free >= 0
        assert self._private >= 0
        assert self._free + self._private + len(self._holders) == self.total_blocks
        assert set(self._idle) == {block for block, count in self._holders.items() if not count}

    def holders(self) -> dict[int, int]:
        """How many sequences hold each cached block. For tests."""
        return dict(self._holders)
