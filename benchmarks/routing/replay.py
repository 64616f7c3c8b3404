"""Replays a trace on simulated engines behind the router's own decisions, on a virtual clock.

Nothing here decides or simulates: the engines are the simulator's schedulers, the index is the KV
indexer's, and decisions, loads and bookings are the router's. This module passes between them what
the services pass over the wire, when it would arrive:

    a request is decided on at its arrival, with the loads and the index as known then
    once a prefill worker has computed a prompt its decode worker is chosen, and pulls in no time
    while no decode worker has room a request is held back, and tried again with each load
    a worker's load comes with the message of every step, and takes over what was booked before
    its KV events are gathered for a while, as workers do, before the index has them
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from benchmarks.routing.trace import Arrival
from libs.common import hashing
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineKvEvent,
    EngineRequest,
    KvSession,
    Leg,
    Prefilled,
    RequestKey,
)
from libs.engine.sim.core.scheduler import TRANSFER_BACKEND, Scheduler, SchedulerLimits
from libs.engine.sim.core.timing import TimingModel, dynamo_mocker
from libs.engine.sim.core.tokens import TokenSource
from services.kv_indexer.core.index import BlockIndex
from services.router.core.decision import Decision, Policy, Prompt, Request, decide
from services.router.core.held import LEASE_PART, HeldRequests
from services.router.core.predicted_overlap import PredictedOverlap
from services.router.core.workers import Booking, InstanceId, Load, Role, Worker

MODEL = "replayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is the same for all policies. The defaults are those of Dynamo's mocker."""

    workers: int
    """Decode workers, which serve whole requests too."""
    prefill_workers: int = 0
    block_size_tokens: int = 16
    kv_blocks: int = 16_384
    """Of each worker."""
    chunk_tokens: int = 8_192
    max_running_requests: int = 256
    max_waiting_requests: int = 1_024
    """At one worker, which refuses more: our workers' default."""
    timing: TimingModel = dynamo_mocker
    kv_event_lag_seconds: float = 0.05
    """Between a change of a worker's cache and the index knowing it."""
    kv_lease_seconds: float = 30.0
    """How long a prefill worker keeps a prompt's KV: our workers' default."""
    max_held_seconds: float = 20.0
    """How long a request is held back for room: our router's default."""
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    arrival: Arrival
    worker: InstanceId | None = None
    """That produces its tokens; None when it never got to one."""
    prefill_worker: InstanceId | None = None
    """That computes its prompt, unless `worker` does."""
    predicted_cached_tokens: int = 0
    """As the router knew when it decided."""
    cached_tokens: int = 0
    """As the engine found when it began."""
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    is_refused: bool = False
    """By a worker with too many waiting: nothing else is known of it."""

    @property
    def ttft_seconds(self) -> float:
        return self.first_token_at - self.arrival.at_seconds

    @property
    def itl_seconds(self) -> float | None:
        """Mean gap between its tokens; None with a single one."""
        gaps = self.arrival.output_tokens - 1
        return (self.last_token_at - self.first_token_at) / gaps if gaps else None


@dataclass(slots=True)
class _Engine:
    """One worker, as itself and as the router sees it."""

    scheduler: Scheduler
    worker: Worker
    is_stepping: bool = False
    bookings: deque[Booking] = field(default_factory=deque)


@dataclass(slots=True)
class _Routed:
    """A request that is not with its decode worker yet."""

    request: Request
    overlaps: Mapping[InstanceId, int]
    """As the index knew at its arrival."""
    prompt: Sequence[int]
    kv_session: KvSession | None = None
    """Once a prefill worker has computed the prompt."""
    kv_expires_at: float = 0.0


class Replay:
    """One run."""

    def __init__(self, arrivals: Sequence[Arrival], policy: Policy, terms: Terms) -> None:
        self._arrivals = arrivals
        self._policy = policy
        self._terms = terms
        self._random = Random(terms.seed)
        self._predicted = PredictedOverlap()
        self._index = BlockIndex(max_bytes=1 << 30)
        self._engines = [
            self._engine(number, Role.DECODE if number < terms.workers else Role.PREFILL)
            for number in range(terms.workers + terms.prefill_workers)
        ]
        self._workers = [engine.worker for engine in self._engines]
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._hashes: dict[RequestKey, list[int]] = {}
        """Of the prompts in progress."""
        self._routed: dict[RequestKey, _Routed] = {}
        """Until they are with their decode workers."""
        self._held: HeldRequests[RequestKey] = HeldRequests()
        self._keepers: dict[str, _Engine] = {}
        """Who has a prompt's KV, by session id."""
        self.outcomes: list[Outcome] = []

    def _engine(self, number: int, role: Role) -> _Engine:
        terms = self._terms
        instance = InstanceId(number + 1)
        worker = Worker(
            instance_id=instance,
            name=f"{role.value}-{number}",
            role=role,
            model=MODEL,
            block_size_tokens=terms.block_size_tokens,
            transfer_backend=TRANSFER_BACKEND,
        )
        worker.load = Load(total_kv_blocks=terms.kv_blocks)
        worker.is_available = True
        self._index.add(instance, MODEL, terms.block_size_tokens)
        limits = SchedulerLimits(
            block_size_tokens=terms.block_size_tokens,
            total_kv_blocks=terms.kv_blocks,
            context_length_tokens=terms.kv_blocks * terms.block_size_tokens,
            max_running_requests=terms.max_running_requests,
            chunk_tokens=terms.chunk_tokens,
            kv_lease_seconds=terms.kv_lease_seconds,
        )
        # Produced tokens never equal prompt tokens: a trace says nothing of their reuse.
        vocabulary = range((1 << 32) - 1_024, 1 << 32)
        scheduler = Scheduler(
            limits,
            terms.timing,
            TokenSource(vocabulary),
            engine_id=worker.name,
            endpoints=(worker.name,),
        )
        return _Engine(scheduler, worker)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> list[Outcome]:
        """Until everything has ended. `progress` is told now and then how many have arrived."""
        arrived = 0
        agenda, arrivals = self._agenda, self._arrivals
        while agenda or arrived < len(arrivals):
            if arrived < len(arrivals) and (
                not agenda or arrivals[arrived].at_seconds <= agenda[0][0]
            ):
                self._arrive(arrivals[arrived])
                arrived += 1
                if not arrived % 1_000:
                    progress(arrived)
            else:
                now, _, act = heapq.heappop(agenda)
                act(now)
        assert not self._hashes, f"{len(self._hashes)} requests never ended"
        return self.outcomes

    def _at(self, time: float, act: Callable[[float], None]) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (time, self._order, act))

    def _arrive(self, arrival: Arrival) -> None:
        now = arrival.at_seconds
        size = self._terms.block_size_tokens
        prompt = arrival.prompt()
        hashes = hashing.sequence_hashes(prompt, size)
        overlaps = {
            InstanceId(instance): blocks
            for instance, blocks in self._index.overlap(MODEL, size, hashes).items()
        }
        request = Request(model=MODEL, prompt_tokens=len(prompt), block_size_tokens=size)
        key = RequestKey(len(self.outcomes))
        self.outcomes.append(Outcome(arrival))
        self._hashes[key] = hashes
        self._routed[key] = _Routed(request, overlaps, prompt)
        self._route(key, now)

    def _route(self, key: RequestKey, now: float, *, may_hold: bool = True) -> bool:
        """Decides on a request, and sends it on its next leg; False when it is held back."""
        routed, outcome = self._routed[key], self.outcomes[key]
        decision = self._decide(routed.request, routed.overlaps, self._hashes[key])
        if may_hold and not decision.has_room:
            if key in self._held:
                return False
            tokens = outcome.arrival.prompt_tokens
            held_tokens = decision.decode_candidates.held_tokens()
            if self._held.add(key, outcome.arrival.at_seconds, tokens, held_tokens):
                longest = self._terms.max_held_seconds
                if routed.kv_session is not None:
                    longest = min(longest, LEASE_PART * (routed.kv_expires_at - now))
                self._at(now + longest, lambda now: self._hold_no_longer(key, now))
                return False
        self._held.remove(key)
        first = decision.prefill or decision.decode
        instance = first.worker.instance_id
        leg = Leg.WHOLE
        if decision.prefill is not None:
            leg = Leg.PREFILL
            outcome.prefill_worker = instance
        else:
            del self._routed[key]
            outcome.worker = instance
            if routed.kv_session is not None:
                leg = Leg.DECODE
                left = routed.kv_expires_at - now
                routed.kv_session = replace(routed.kv_session, time_to_live_seconds=left)
        engine = self._engines[instance - 1]
        if leg is not Leg.DECODE:
            outcome.predicted_cached_tokens = first.overlap_blocks * self._terms.block_size_tokens
            if engine.scheduler.load().waiting_requests >= self._terms.max_waiting_requests:
                outcome.is_refused = True
                self._routed.pop(key, None)
                del self._hashes[key]
                return True
        engine.worker.book(first.booking)
        engine.bookings.append(first.booking)
        self._submit(engine, key, routed.prompt, now, leg, routed.kv_session)
        return True

    def _hold_no_longer(self, key: RequestKey, now: float) -> None:
        if key in self._held:
            self._route(key, now, may_hold=False)

    def _fill(self, worker: Worker, now: float) -> None:
        """Sends what is held back and has room now that a worker has told its load."""
        for key in self._held.fitting({worker.instance_id: worker.free_kv_tokens}):
            self._route(key, now)

    def _decide(
        self, request: Request, indexed: Mapping[InstanceId, int], hashes: Sequence[int]
    ) -> Decision:
        overlaps = self._predicted.overlap(hashes)
        for held, blocks in indexed.items():
            overlaps[held] = max(blocks, overlaps.get(held, 0))
        decision = decide(request, self._workers, overlaps, self._policy, self._random)
        assert decision is not None
        return decision

    def _submit(
        self,
        engine: _Engine,
        key: RequestKey,
        prompt: Sequence[int],
        now: float,
        leg: Leg,
        kv_session: KvSession | None = None,
    ) -> None:
        hashes = self._hashes[key]
        self._predicted.sent(engine.worker.instance_id, hashes)
        engine.scheduler.submit(
            EngineRequest(
                key=key,
                request_id="",
                prompt=prompt,
                last_sequence_hash=hashes[-1] if hashes else 0,
                leg=leg,
                max_tokens=self.outcomes[key].arrival.output_tokens,
                ignore_eos=True,
                kv_session=kv_session,
            ),
            now,
        )
        self._wake(engine, now)

    def _wake(self, engine: _Engine, now: float) -> None:
        """There is something to do for it, or room to do it."""
        if not engine.is_stepping:
            engine.is_stepping = True
            # After everything else that happens at this moment.
            self._at(now, lambda now: self._begin(engine, now))

    def _begin(self, engine: _Engine, now: float) -> None:
        scheduler = engine.scheduler
        seconds = scheduler.begin_step(now)
        while pulls := scheduler.take_pulls():
            for pull in pulls:
                session_id = pull.kv_session.session_id
                keeper = self._keepers.pop(session_id)
                keeper.scheduler.release(session_id, now)
                scheduler.pulled(pull.key)
                self._wake(keeper, now)
            # Begun again, now with those whose prompt has come.
            seconds = scheduler.begin_step(now)
        engine.is_stepping = seconds is not None
        if seconds is not None:
            self._at(now + seconds, lambda now: self._end(engine, now))
        elif (expiry := scheduler.next_expiry) is not None:
            self._at(expiry, lambda now: self._wake(engine, now))

    def _end(self, engine: _Engine, now: float) -> None:
        step = engine.scheduler.end_step(now)
        for start in step.starts:
            outcome = self.outcomes[start.key]
            outcome.first_token_at = now
            if outcome.prefill_worker is None:
                outcome.cached_tokens = start.cached_tokens
        for prefilled in step.prefilled:
            self._hand_over(engine, prefilled, now)
        for finish in step.finishes:
            assert finish.error is None, finish.error
            self.outcomes[finish.key].last_token_at = now
            self._predicted.ended(engine.worker.instance_id, self._hashes.pop(finish.key))
        self._tell_load(engine)
        if engine.worker.role is Role.DECODE and self._held:
            self._fill(engine.worker, now)
        if events := engine.scheduler.take_events():
            instance = engine.worker.instance_id
            self._at(
                now + self._terms.kv_event_lag_seconds,
                lambda _: self._index_events(instance, events),
            )
        self._begin(engine, now)

    def _hand_over(self, engine: _Engine, prefilled: Prefilled, now: float) -> None:
        key, session = prefilled.key, prefilled.kv_session
        self.outcomes[key].cached_tokens = prefilled.cached_tokens
        self._predicted.ended(engine.worker.instance_id, self._hashes[key])
        self._keepers[session.session_id] = engine
        routed = self._routed[key]
        routed.kv_session = session
        routed.kv_expires_at = now + session.time_to_live_seconds
        routed.request = replace(
            routed.request, prompt=Prompt.COMPUTED, transfer_backend=session.transfer_backend
        )
        self._route(key, now)

    def _tell_load(self, engine: _Engine) -> None:
        load = engine.scheduler.load()
        engine.worker.load = Load(
            load.running_requests,
            load.waiting_requests,
            load.queued_prefill_tokens,
            load.active_kv_blocks,
            load.total_kv_blocks,
        )
        while engine.bookings:
            engine.worker.unbook(engine.bookings.popleft())

    def _index_events(self, instance: InstanceId, events: Sequence[EngineKvEvent]) -> None:
        """This engine names blocks by their sequence hashes, and holds no block without those
        before it: what the worker's ledger would publish is what the engine says."""
        for event in events:
            if isinstance(event, EngineBlocksStored):
                self._index.store(instance, [_sequence_hash(h) for h in event.engine_hashes])
            elif isinstance(event, EngineBlocksRemoved):
                self._index.discard(instance, [_sequence_hash(h) for h in event.engine_hashes])


def _sequence_hash(engine_hash: bytes) -> int:
    return int.from_bytes(engine_hash, "big")
