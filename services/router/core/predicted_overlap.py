"""What workers will hold because of requests that have been sent to them. Pure.

The index knows a block some time after it was computed, and until then a second request with the
same prefix would be sent elsewhere and compute it again. So the blocks of a request's prompt count
as held by its worker from when it is sent there until it ends: by then the index knows, and while
it runs they are not evicted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from services.router.core.workers import InstanceId

STRIDE_BLOCKS = 8
"""One block in so many is kept, and stands for those before it: a hash names its whole prefix. A
prediction is too short by less than this, at an eighth of the work for long prompts."""


class PredictedOverlap:
    """Prompts of the requests in progress, by worker. Bounded by those."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[InstanceId, int]] = {}
        """By sequence hash; how many requests of each worker have the block."""

    def sent(self, instance: InstanceId, prompt: Sequence[int]) -> None:
        """A request is on its way to a worker. Its prompt is given by the sequence hashes of its
        full blocks."""
        for block in prompt[STRIDE_BLOCKS - 1 :: STRIDE_BLOCKS]:
            counts = self._holders.setdefault(block, {})
            counts[instance] = counts.get(instance, 0) + 1

    def ended(self, instance: InstanceId, prompt: Sequence[int]) -> None:
        """A request that was sent is over, or will not be run."""
        for block in prompt[STRIDE_BLOCKS - 1 :: STRIDE_BLOCKS]:
            counts = self._holders[block]
            counts[instance] -= 1
            if not counts[instance]:
                del counts[instance]
                if not counts:
                    del self._holders[block]

    def overlap(self, prompt: Sequence[int]) -> dict[InstanceId, int]:
        """Leading blocks of a prompt that each worker is about to hold, if any."""
        found: dict[InstanceId, int] = {}
        holders = self._holders
        if not holders:
            return found
        levels = prompt[STRIDE_BLOCKS - 1 :: STRIDE_BLOCKS]
        # Whoever has a block has all before it, so holders are only gained on the way up from the
        # deepest block that anybody has; blocks that gain none are skipped.
        depth = bisect_left(levels, True, key=lambda block: block not in holders)
        while depth:
            gained = holders[levels[depth - 1]].keys() - found.keys()
            found.update(dict.fromkeys(gained, depth * STRIDE_BLOCKS))
            known = len(found)
            depth = bisect_left(
                levels, True, hi=depth, key=lambda block: len(holders[block]) <= known
            )
        return found

    def __len__(self) -> int:
        """Blocks kept."""
        return len(self._holders)
