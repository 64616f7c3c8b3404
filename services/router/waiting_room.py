"""Where requests wait for room at a decode worker, those of all frontends together."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from prometheus_client import Gauge

from services.router.core.decision_log import Record
from services.router.core.held import HeldRequests
from services.router.core.workers import InstanceId, Role
from services.router.fleet import Fleet

LOOK_SECONDS = 0.01
"""Between two looks at who fits: about a step of an engine, with which its load comes."""

TRIES_PER_TURN = 32
"""Decisions that are made before the event loop gets to do something else."""

HELD = Gauge(
    "switchgear_router_held_requests", "Requests held back since no decode worker has room for them"
)

Retry = Callable[[], None]
"""Decides on a request again, and takes it out if it could be sent."""


class WaitingRoom:
    """Requests by what is to be done when a worker may have room for them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._held: defaultdict[str, HeldRequests[Retry]] = defaultdict(HeldRequests)
        """By model; none is empty."""
        self._timer: asyncio.Handle | None = None
        self._round = self._to_try()

    def add(self, retry: Retry, record: Record, arrived_at: float) -> bool:
        """Holds a request for which a decision has found no room; False when too many are held."""
        held = self._held[record.model]
        held_tokens = record.decision.decode_candidates.held_tokens()
        if not held.add(retry, arrived_at, record.prompt_tokens, held_tokens):
            return False
        HELD.inc()
        self._look_later()
        return True

    def remove(self, retry: Retry, model: str) -> None:
        """It was sent, or is over. Others are ignored."""
        held = self._held.get(model)
        if held is None or retry not in held:
            return
        held.remove(retry)
        HELD.dec()
        if not held:
            del self._held[model]

    def _look_later(self) -> None:
        if self._timer is None and self._held:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Tries those that fit again; beyond some in the next turn of the loop, from there on."""
        self._timer = None
        tries = 0
        try:
            for retry in islice(self._round, TRIES_PER_TURN):
                tries += 1
                retry()
        finally:
            if tries == TRIES_PER_TURN:
                self._timer = asyncio.get_running_loop().call_soon(self._look)
            else:
                self._round = self._to_try()
                self._look_later()

    def _to_try(self) -> Iterator[Retry]:
        """One round through all that are held."""
        for model, held in list(self._held.items()):
            yield from held.to_try(partial(self._free_tokens, model))

    def _free_tokens(self, model: str) -> dict[InstanceId, int]:
        return {
            worker.instance_id: worker.free_kv_tokens
            for worker in self._fleet.workers
            if worker.is_available and worker.role is Role.DECODE and worker.model == model
        }
