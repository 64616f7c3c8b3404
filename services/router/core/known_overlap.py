"""What workers hold of a prompt, by all that this router knows. Pure.

There are three sources, each for another part of a prompt's life at a worker:

    sent ................ ended ........... its KV events are in the index
    |  predicted_overlap   |  predicted_overlap, a little longer | the index
                           |  estimated_holdings, where a worker has no KV events

Where several speak of a worker the largest overlap counts: what is on its way comes on top of what
the index knows, and never takes anything from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from services.router.core.candidates import Overlaps
from services.router.core.predicted_overlap import PredictedOverlap
from services.router.core.workers import InstanceId, Worker

KV_EVENT_SECONDS = 1.0
"""In which KV events reach the index, unless something is wrong."""


class KnownOverlap:
    """Bounded by the requests in progress, and those that ended in the last second."""

    def __init__(self) -> None:
        self._predicted = PredictedOverlap()
        self._ended: deque[tuple[float, InstanceId, Sequence[int]]] = deque()
        """Computed prompts, with the time until which the index may not know of them."""

    def sent(self, worker: Worker, prompt: Sequence[int]) -> None:
        """A leg is on its way to a worker. The prompt is given by the sequence hashes of its full
        blocks, and must not change until the leg has ended."""
        self._predicted.sent(worker.instance_id, prompt)

    def ended(
        self, worker: Worker, prompt: Sequence[int], now: float, *, is_computed: bool
    ) -> None:
        """A leg that was sent is over. `is_computed`: whether the worker got as far as having the
        prompt's KV. `now`, in seconds, never goes back."""
        self._forget(now)
        if is_computed and worker.holdings is None:
            self._ended.append((now + KV_EVENT_SECONDS, worker.instance_id, prompt))
            return
        self._predicted.ended(worker.instance_id, prompt)
        if is_computed and worker.holdings is not None:
            worker.holdings.given(prompt, now)

    def overlaps(
        self, prompt: Sequence[int], told: Overlaps, estimated: Iterable[Worker], now: float
    ) -> Overlaps:
        """Leading blocks of a prompt that workers hold or are about to. `told` is what the index
        says; `estimated` are the workers without KV events that might run it."""
        self._forget(now)
        held = dict(told)
        for worker in estimated:
            if worker.holdings is not None:
                held[worker.instance_id] = worker.holdings.overlap(prompt, now)
        for instance, blocks in self._predicted.overlap(prompt).items():
            known = held.get(instance, 0)
            if isinstance(known, int):
                held[instance] = max(known, blocks)
            else:
                held[instance] = known.brought_up(blocks)
        return held

    def _forget(self, now: float) -> None:
        ended = self._ended
        while ended and ended[0][0] <= now:
            _, instance, prompt = ended.popleft()
            self._predicted.ended(instance, prompt)

    def __len__(self) -> int:
        """Blocks kept of prompts that are on their way."""
        return len(self._predicted)
