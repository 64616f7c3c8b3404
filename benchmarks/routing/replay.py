"""Replays a trace on simulated engines behind the router's own decisions, on a virtual clock.

Nothing here decides or simulates: the engines are the simulator's schedulers, the index is the KV
indexer's, and decisions, loads and bookings are the router's. This module passes between them what
the services pass over the wire, when it would arrive:

    a request is decided on at its arrival, with the loads and the index as known then
    once a prefill worker has computed a prompt its decode worker is chosen, and pulls in no time
    while no decode worker has room a request is held back, and tried again with each load
    a worker's load comes with the message of a step to each router that has a request in it, and
    soon after it has changed much to all of them, as workers tell it (libs/worker); it takes over
    what was booked before
    its KV events are gathered for a while, as workers do, before the index has them
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
    Step,
)
from libs.engine.sim.core.scheduler import TRANSFER_BACKEND, Scheduler, SchedulerLimits
from libs.engine.sim.core.timing import TimingModel, dynamo_mocker
from libs.engine.sim.core.tokens import TokenSource
from libs.worker.core.session import Session
from libs.worker.load_spreading import LoadSpreading
from services.kv_indexer.core.index import FastestIndex
from services.router.core.decision import Candidate, Decision, Policy, Prompt, Request, decide
from services.router.core.held import HeldRequests, longest_wait_seconds
from services.router.core.predicted_overlap import PredictedOverlap
from services.router.core.workers import Booking, InstanceId, Load, Role, Worker

MODEL = "replayed"

_WINDOW_RESPONSES = 1 << 62
"""Routers read all that they are told at once."""


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
    routers: int = 1
    """Requests go to them in turn. They know nothing of each other."""
    load_lag_seconds: float = 0.002
    """Between a worker telling its load and a router knowing it."""
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
    """One worker."""

    instance: InstanceId
    role: Role
    scheduler: Scheduler
    sessions: list[Session] = field(default_factory=list)
    """What each router has not been told yet, in their order."""
    spreading: LoadSpreading = field(init=False)
    is_stepping: bool = False


@dataclass(slots=True)
class _Seen:
    """A worker as a router sees it."""

    worker: Worker
    bookings: deque[tuple[int, Booking]] = field(default_factory=deque)
    """By number, until the worker's load has them."""
    sent: int = 0
    """Requests, of all time."""

    def tell(self, load: Load, taken: int) -> None:
        """The worker's load, which has so many of what was sent in it."""
        self.worker.load = load
        while self.bookings and self.bookings[0][0] <= taken:
            self.worker.unbook(self.bookings.popleft()[1])


class _Router:
    """What one router knows."""

    def __init__(self, seen: list[_Seen], seed: int) -> None:
        self.seen = seen
        """In the order of the engines."""
        self.workers = [one.worker for one in seen]
        self.random = Random(seed)
        self.predicted = PredictedOverlap()
        self.held: HeldRequests[RequestKey] = HeldRequests()


@dataclass(slots=True)
class _Routed:
    """A request that is not with its decode worker yet."""

    request: Request
    overlaps: Mapping[InstanceId, int]
    """As the index knew at its arrival."""
    prompt: Sequence[int]
    held_until: float = 0.0
    kv_session: KvSession | None = None
    """Once a prefill worker has computed the prompt."""
    kv_expires_at: float = 0.0


class Replay:
    """One run."""

    def __init__(self, arrivals: Sequence[Arrival], policy: Policy, terms: Terms) -> None:
        self._arrivals = arrivals
        self._policy = policy
        self._terms = terms
        self._index = FastestIndex(1 << 30)
        self._engines = [
            self._engine(number, Role.DECODE if number < terms.workers else Role.PREFILL)
            for number in range(terms.workers + terms.prefill_workers)
        ]
        self._routers = [
            _Router([_Seen(self._worker(engine)) for engine in self._engines], terms.seed + number)
            for number in range(terms.routers)
        ]
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._now = 0.0
        for engine in self._engines:
            for router in range(terms.routers):
                wake = partial(self._wake_session, engine, router)
                engine.sessions.append(Session(wake, _WINDOW_RESPONSES))
            engine.spreading = LoadSpreading(engine.sessions, engine.scheduler.load, self)
        self._hashes: dict[RequestKey, list[int]] = {}
        """Of the prompts in progress."""
        self._routed: dict[RequestKey, _Routed] = {}
        """Until they are with their decode workers."""
        self._keepers: dict[str, _Engine] = {}
        """Who has a prompt's KV, by session id."""
        self.outcomes: list[Outcome] = []

    def _engine(self, number: int, role: Role) -> _Engine:
        terms = self._terms
        instance = InstanceId(number + 1)
        name = f"{role.value}-{number}"
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
            engine_id=name,
            endpoints=(name,),
        )
        return _Engine(instance, role, scheduler)

    def _worker(self, engine: _Engine) -> Worker:
        worker = Worker(
            instance_id=engine.instance,
            name=engine.scheduler.endpoints[0],
            role=engine.role,
            model=MODEL,
            block_size_tokens=self._terms.block_size_tokens,
            transfer_backend=TRANSFER_BACKEND,
        )
        worker.load = Load(total_kv_blocks=self._terms.kv_blocks)
        worker.is_available = True
        return worker

    def _router_number(self, key: RequestKey) -> int:
        return key % len(self._routers)

    def _router(self, key: RequestKey) -> _Router:
        return self._routers[self._router_number(key)]

    def run(self, progress: Callable[[int], None] = lambda done: None) -> list[Outcome]:
        """Until everything has ended. `progress` is told now and then how many have arrived."""
        arrived = 0
        agenda, arrivals = self._agenda, self._arrivals
        while agenda or arrived < len(arrivals):
            if arrived < len(arrivals) and (
                not agenda or arrivals[arrived].at_seconds <= agenda[0][0]
            ):
                self._now = arrivals[arrived].at_seconds
                self._arrive(arrivals[arrived])
                arrived += 1
                if not arrived % 1_000:
                    progress(arrived)
            else:
                now, _, act = heapq.heappop(agenda)
                self._now = now
                act(now)
        assert not self._hashes, f"{len(self._hashes)} requests never ended"
        return self.outcomes

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        """The event loop of the workers."""
        self._at(self._now + delay, lambda _: callback())

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

    def _route(self, key: RequestKey, now: float, *, may_hold: bool = True) -> None:
        """Decides on a request, and sends it on its next leg or holds it back."""
        routed, router = self._routed[key], self._router(key)
        decision = self._decide(router, routed, self._hashes[key])
        is_to_wait = may_hold and not decision.has_room
        if is_to_wait and (key in router.held or self._hold(key, decision, now)):
            return
        router.held.remove(key)
        if decision.prefill is None:
            self.outcomes[key].worker = decision.decode.worker.instance_id
            leg = Leg.WHOLE if routed.kv_session is None else Leg.DECODE
            self._send(key, decision.decode, leg, now)
            del self._routed[key]
        else:
            self.outcomes[key].prefill_worker = decision.prefill.worker.instance_id
            self._send(key, decision.prefill, Leg.PREFILL, now)

    def _hold(self, key: RequestKey, decision: Decision, now: float) -> bool:
        routed, arrival = self._routed[key], self.outcomes[key].arrival
        held_tokens = decision.decode_candidates.held_tokens()
        held = self._router(key).held
        if not held.add(key, arrival.at_seconds, arrival.prompt_tokens, held_tokens):
            return False
        kv_left = None if routed.kv_session is None else routed.kv_expires_at - now
        longest = self._terms.max_held_seconds
        routed.held_until = now + longest_wait_seconds(longest, kv_left_seconds=kv_left)
        self._at(routed.held_until, lambda now: self._hold_no_longer(key, now))
        return True

    def _hold_no_longer(self, key: RequestKey, now: float) -> None:
        # It may have been sent meanwhile, and be held again for its next leg.
        if key in self._router(key).held and now >= self._routed[key].held_until:
            self._route(key, now, may_hold=False)

    def _send(self, key: RequestKey, chosen: Candidate, leg: Leg, now: float) -> None:
        outcome, routed = self.outcomes[key], self._routed[key]
        engine = self._engines[chosen.worker.instance_id - 1]
        session = routed.kv_session
        if session is None:
            outcome.predicted_cached_tokens = chosen.overlap_blocks * self._terms.block_size_tokens
            if engine.scheduler.load().waiting_requests >= self._terms.max_waiting_requests:
                outcome.is_refused = True
                del self._hashes[key]
                return
        else:
            session = replace(session, time_to_live_seconds=routed.kv_expires_at - now)
        seen = self._router(key).seen[engine.instance - 1]
        seen.worker.book(chosen.booking)
        seen.sent += 1
        seen.bookings.append((seen.sent, chosen.booking))
        engine.sessions[self._router_number(key)].command(seen.sent, 0)
        self._submit(engine, key, routed.prompt, now, leg, session)
        engine.spreading.changed()

    def _decide(self, router: _Router, routed: _Routed, hashes: Sequence[int]) -> Decision:
        overlaps = router.predicted.overlap(hashes)
        for held, blocks in routed.overlaps.items():
            overlaps[held] = max(blocks, overlaps.get(held, 0))
        decision = decide(routed.request, router.workers, overlaps, self._policy, router.random)
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
        self._router(key).predicted.sent(engine.instance, hashes)
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
            return
        engine.spreading.changed()
        if (expiry := scheduler.next_expiry) is not None:
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
            hashes = self._hashes.pop(finish.key)
            self._router(finish.key).predicted.ended(engine.instance, hashes)
        for router in {self._router_number(key) for key in _keys(step)}:
            engine.sessions[router].flush()
        engine.spreading.changed()
        if events := engine.scheduler.take_events():
            self._at(
                now + self._terms.kv_event_lag_seconds,
                lambda _: self._index_events(engine.instance, events),
            )
        self._begin(engine, now)

    def _hand_over(self, engine: _Engine, prefilled: Prefilled, now: float) -> None:
        key, session = prefilled.key, prefilled.kv_session
        self.outcomes[key].cached_tokens = prefilled.cached_tokens
        self._router(key).predicted.ended(engine.instance, self._hashes[key])
        self._keepers[session.session_id] = engine
        routed = self._routed[key]
        routed.kv_session = session
        routed.kv_expires_at = now + session.time_to_live_seconds
        routed.request = replace(
            routed.request, prompt=Prompt.COMPUTED, transfer_backend=session.transfer_backend
        )
        self._route(key, now)

    def _wake_session(self, engine: _Engine, router: int) -> None:
        # With the step that begins now, as a worker writes after everything else.
        self._at(self._now, lambda now: self._tell(engine, router, now))

    def _tell(self, engine: _Engine, number: int, now: float) -> None:
        response = engine.sessions[number].take(engine.scheduler.load)
        if response is None:
            return
        its = response.load
        load = Load(
            its.running_requests,
            its.waiting_requests,
            its.queued_prefill_tokens,
            its.active_kv_blocks,
            its.total_kv_blocks,
        )
        router = self._routers[number]
        seen = router.seen[engine.instance - 1]

        def learn(now: float) -> None:
            seen.tell(load, response.taken_sequence_number)
            if router.held and engine.role is Role.DECODE:
                for key in router.held.to_try(partial(_room, seen.worker)):
                    self._route(key, now)

        self._at(now + self._terms.load_lag_seconds, learn)

    def _index_events(self, instance: InstanceId, events: Sequence[EngineKvEvent]) -> None:
        """This engine names blocks by their sequence hashes, and holds no block without those
        before it: what the worker's ledger would publish is what the engine says."""
        for event in events:
            if isinstance(event, EngineBlocksStored):
                self._index.store(instance, [_sequence_hash(h) for h in event.engine_hashes])
            elif isinstance(event, EngineBlocksRemoved):
                self._index.discard(instance, [_sequence_hash(h) for h in event.engine_hashes])


def _keys(step: Step) -> Iterator[RequestKey]:
    """Whose client hears of the step."""
    yield from step.keys
    yield from (finish.key for finish in step.finishes)
    yield from (prefilled.key for prefilled in step.prefilled)


def _room(worker: Worker) -> dict[InstanceId, int]:
    return {worker.instance_id: worker.free_kv_tokens}


def _sequence_hash(engine_hash: bytes) -> int:
    return int.from_bytes(engine_hash, "big")
