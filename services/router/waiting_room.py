"""Where requests wait for room at a decode worker, those of all frontends together."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from prometheus_client import Gauge, Histogram

from libs.common import logs
from services.router.core.decision_log import Record
from services.router.core.held import HeldRequests
from services.router.core.hold import Hold, HoldEnd
from services.router.core.workers import InstanceId, Role
from services.router.fleet import Fleet

log = logs.get(__name__)

LOOK_SECONDS = 0.01
"""Between two looks at who fits: about a step of an engine, with which its load comes."""

TRIES_PER_TURN = 32
"""Decisions that are made before the event loop gets to do something else."""

REST_SECONDS = 5.0
"""Without anybody held before it is said that there is room again: workers that are just full have
room now and then."""

HELD = Gauge(
    "switchgear_router_held_requests", "Requests held back since no decode worker has room for them"
)
HELD_SECONDS = Histogram(
    "switchgear_router_held_seconds",
    "How long requests were held back, by what became of them then.",
    ["outcome"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60),
)
for _end in HoldEnd:
    HELD_SECONDS.labels(_end.value)

Retry = Callable[[], None]
"""Decides on a request again, and has it leave if it could be sent."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One request's."""

    model: str
    retry: Retry
    hold: Hold


@dataclass(slots=True)
class _Spell:
    """A time in which requests of a model are held, again and again."""

    began_at: float
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0
    """That any of those was held."""
    rest: asyncio.TimerHandle | None = None
    """Ends it, while nobody is held."""


class WaitingRoom:
    """Requests by what is to be done when a worker may have room for them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._held: defaultdict[str, HeldRequests[Place]] = defaultdict(HeldRequests)
        """By model; none is empty."""
        self._spells: dict[str, _Spell] = {}
        """By model."""
        self._timer: asyncio.Handle | None = None
        self._round = self._to_try()
        self._loop = asyncio.get_running_loop()

    def take_in(
        self, retry: Retry, record: Record, arrived_at: float, *, is_prompt_computed: bool
    ) -> Place | None:
        """Holds a request for which a decision has found no room; None when too many are held."""
        candidates = record.decision.decode_candidates
        nearest, lacking_tokens = candidates.nearest_to_room()
        hold = Hold(
            began_at=self._loop.time(),
            nearest=nearest,
            lacking_tokens=lacking_tokens,
            is_prompt_computed=is_prompt_computed,
        )
        place = Place(record.model, retry, hold)
        held = self._held[record.model]
        if not held.add(place, arrived_at, record.prompt_tokens, candidates.held_tokens()):
            return None
        HELD.inc()
        self._note_no_room(record, hold)
        self._look_later()
        return place

    def leave(self, place: Place, end: HoldEnd) -> None:
        """The request is held no longer. Nothing happens if it has left before."""
        held = self._held.get(place.model)
        if held is None or place not in held:
            return
        held.remove(place)
        HELD.dec()
        seconds = place.hold.ended(self._loop.time(), end)
        HELD_SECONDS.labels(end.value).observe(seconds)
        spell = self._spells[place.model]
        spell.outcomes[end.value] += 1
        spell.longest_seconds = max(spell.longest_seconds, seconds)
        if not held:
            del self._held[place.model]
            spell.rest = self._loop.call_later(REST_SECONDS, self._end_spell, place.model)

    def _note_no_room(self, record: Record, hold: Hold) -> None:
        spell = self._spells.get(record.model)
        if spell is None:
            self._spells[record.model] = _Spell(hold.began_at)
            log.warning(
                "no room at any worker",
                model=record.model,
                workers=len(self._free_tokens(record.model)),
                request_id=record.request_id,
                prompt_tokens=record.prompt_tokens,
                nearest_worker=hold.nearest.name,
                lacking_tokens=hold.lacking_tokens,
            )
        elif spell.rest is not None:
            spell.rest.cancel()
            spell.rest = None

    def _end_spell(self, model: str) -> None:
        spell = self._spells.pop(model)
        workers = len(self._free_tokens(model))
        log.info(
            "room again" if workers else "no worker left to wait for",
            model=model,
            workers=workers,
            held_requests=spell.outcomes.total(),
            outcomes=dict(spell.outcomes),
            longest_seconds=round(spell.longest_seconds, 3),
            lasted_seconds=round(self._loop.time() - REST_SECONDS - spell.began_at, 3),
        )

    def _look_later(self) -> None:
        if self._timer is None and self._held:
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Tries those that fit again; beyond some in the next turn of the loop, from there on."""
        self._timer = None
        tries = 0
        try:
            for place in islice(self._round, TRIES_PER_TURN):
                tries += 1
                place.retry()
        finally:
            if tries == TRIES_PER_TURN:
                self._timer = self._loop.call_soon(self._look)
            else:
                self._round = self._to_try()
                self._look_later()

    def _to_try(self) -> Iterator[Place]:
        """One round through all that are held."""
        for model, held in list(self._held.items()):
            yield from held.to_try(partial(self._free_tokens, model))

    def _free_tokens(self, model: str) -> dict[InstanceId, int]:
        return {
            worker.instance_id: worker.free_kv_tokens
            for worker in self._fleet.workers
            if worker.is_available and worker.role is Role.DECODE and worker.model == model
        }
