"""What workers will hold because of requests that have been sent to them. Pure.

The index knows a block some time after it was computed, and until then a second request with the
same prefix would be sent elsewhere and compute it again. So the blocks of a request's prompt count
as held by its worker from when it is sent there until it ends: by then the index knows, and while
it runs they are not evicted.
"""

from __future__ import annotations

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
        if not self._holders:
            return found
        for position in range(STRIDE_BLOCKS - 1, len(prompt), STRIDE_BLOCKS):
            counts = self._holders.get(prompt[position])
            if counts is None:
                break  # Nobody has this block, so nobody has one after it.
            found.update(dict.fromkeys(counts, position + 1))
        return found

    def __len__(self) -> int:
        """Blocks kept."""
        return len(self._holders)
