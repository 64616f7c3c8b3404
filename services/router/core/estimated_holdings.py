"""What a worker without KV events probably holds: the prompts it was given of late. Pure.

Theory of operation: blocks are kept in the order in which they were last given, and of one prompt
the last block comes first. So whatever is dropped from the old end is a leaf: a block is only ever
kept together with all before it, just as in an engine, and the depth of a match can be bisected.

    old  | d2 d1 d0 | c1 b1 a0 |  new        after prompts d0 d1 d2, then a0 b1 c1
    ^ dropped first
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SequenceHash = int


class EstimatedHoldings:
    """One worker's blocks, with the time until which each is believed in."""

    def __init__(self, *, capacity_blocks: int, ttl_seconds: float) -> None:
        """`capacity_blocks` is what the engine has room for: it drops the least recently used, too.
        `ttl_seconds` bounds how long a block is believed in, since nobody tells of its end."""
        self._capacity_blocks = capacity_blocks
        self._ttl_seconds = ttl_seconds
        self._expires_at: dict[SequenceHash, float] = {}

    def __len__(self) -> int:
        return len(self._expires_at)

    def given(self, prompt: Sequence[SequenceHash], now: float) -> None:
        """The worker will come to hold these blocks. `now` never goes back."""
        self._expire(now)
        blocks = self._expires_at
        expires_at = now + self._ttl_seconds
        for block in reversed(prompt[: self._capacity_blocks]):
            blocks.pop(block, None)
            blocks[block] = expires_at
        while len(blocks) > self._capacity_blocks:
            del blocks[next(iter(blocks))]

    def overlap(self, prompt: Sequence[SequenceHash], now: float) -> int:
        """Leading blocks of the prompt that the worker probably holds."""
        self._expire(now)
        return bisect_left(prompt, True, key=lambda block: block not in self._expires_at)

    def _expire(self, now: float) -> None:
        blocks = self._expires_at
        while blocks:
            oldest = next(iter(blocks))
            if blocks[oldest] > now:
                return
            del blocks[oldest]

    def check_invariants(self) -> None:
        """Blocks expire in their order, and fit in."""
        times = list(self._expires_at.values())
        assert times == sorted(times)
        assert len(times) <= self._capacity_blocks
