"""Joins one engine and its clients: requests go to the engine, outputs to their session.

Everything runs on the event loop. The engine reports once per step; each session with news is then
woken once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from libs.common import grpc_errors, logs
from libs.common.errors import (
    DeadlineExceeded,
    NoLiveInstance,
    Overloaded,
    ProtocolViolation,
    SwitchgearError,
    WorkerLost,
)
from libs.engine.interface import (
    Engine,
    EngineKvEvent,
    EngineRequest,
    Finish,
    FinishReason,
    RequestKey,
    Step,
)
from libs.worker import leg_trace, metrics
from libs.worker.core import wire
from libs.worker.core.session import Handle, Session
from libs.worker.load_spreading import LoadSpreading
from switchgear.worker.v1 import worker_pb2

log = logs.get(__name__)


class _Live:
    """A request in the engine."""

    __slots__ = ("deadline", "handle", "leg", "prompt_tokens", "request_id", "session", "trace")

    def __init__(self, session: Session, handle: Handle, request: EngineRequest) -> None:
        self.session = session
        self.handle = handle
        self.request_id = request.request_id
        self.leg = request.leg
        self.prompt_tokens = len(request.prompt)
        self.trace = leg_trace.follow(request)
        """None when it is not sampled."""
        self.deadline: asyncio.TimerHandle | None = None


class EngineHost:
    """The engine's sink, and the sessions' way to the engine."""

    limits: wire.Limits
    """Set once the engine has started, before anything is submitted."""

    def __init__(self, engine: Engine, *, max_waiting_requests: int) -> None:
        self.engine = engine
        self.sessions: set[Session] = set()
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Resolved when the engine dies."""
        self.is_draining = False
        self.idle = asyncio.Event()
        """Set while no request is in the engine."""
        self.idle.set()
        self._max_waiting_requests = max_waiting_requests
        self._early_kv_events: list[EngineKvEvent] = []
        self._on_kv_events: Callable[[Sequence[EngineKvEvent]], None] = self._early_kv_events.extend
        self._live: dict[RequestKey, _Live] = {}
        self._keys = count(1)
        self._load = LoadSpreading(self.sessions, engine.load, asyncio.get_running_loop())

    def publish_to(self, take: Callable[[Sequence[EngineKvEvent]], None]) -> None:
        """Who gets the engine's KV events from now on, those since its start included."""
        self._on_kv_events = take
        if self._early_kv_events:
            take(self._early_kv_events)
            self._early_kv_events.clear()

    def request_ids(self) -> list[str]:
        """Ids of the requests in the engine."""
        return [live.request_id for live in self._live.values()]

    def open(self, wake: Callable[[], None], window_responses: int) -> Session:
        """A new client. The first message it takes has the load."""
        session = Session(wake, window_responses)
        self.sessions.add(session)
        session.flush()
        return session

    def close(self, session: Session) -> None:
        """The client is gone: its requests are cancelled."""
        self.sessions.discard(session)
        self.cancel(session, list(session.keys))
        for other in self.sessions:
            other.repeat_load()
        self._load.changed()

    def submit(self, session: Session, submits: Iterable[worker_pb2.Submit]) -> None:
        """Gives requests to the engine, or refuses them. Raises ProtocolViolation for a handle
        that is live already."""
        accepted: list[EngineRequest] = []
        room = self._max_waiting_requests - self.engine.load().waiting_requests
        for submit in submits:
            handle = submit.handle
            if handle in session.keys:
                raise ProtocolViolation(f"handle {handle} is in use")
            try:
                if self.is_draining:
                    raise NoLiveInstance("the worker is draining")
                if len(accepted) >= room:
                    raise Overloaded(
                        f"{self._max_waiting_requests} requests are waiting", retry_after_seconds=1
                    )
                request = wire.engine_request(submit, RequestKey(next(self._keys)), self.limits)
                live = _Live(session, handle, request)
                if submit.HasField("timeout"):
                    self._set_deadline(live, request.key, grpc_errors.seconds_of(submit.timeout))
            except SwitchgearError as error:
                metrics.REFUSALS.labels(error.reason).inc()
                session.refused(handle, error)
                continue
            session.keys[handle] = request.key
            self._live[request.key] = live
            accepted.append(request)
        if accepted:
            self.idle.clear()
            self.engine.submit(accepted)
            self._load.changed()

    def _set_deadline(self, live: _Live, key: RequestKey, seconds: float) -> None:
        if seconds <= 0:
            raise DeadlineExceeded("the deadline had passed when the worker got the request")
        loop = asyncio.get_running_loop()
        live.deadline = loop.call_later(seconds, self._expire, key)

    def _expire(self, key: RequestKey) -> None:
        self.engine.cancel([key])
        error = DeadlineExceeded("the deadline passed while the worker had the request")
        self.step(Step(finishes=[Finish(key, FinishReason.ERROR, error)]))

    def cancel(self, session: Session, handles: Iterable[Handle]) -> None:
        """Drops requests, and the KV kept for those that have been prefilled; they are never heard
        of again. Unknown handles are ignored."""
        keys: list[RequestKey] = []
        for handle in handles:
            key = session.keys.pop(handle, None) or session.kept.pop(handle, None)
            if key is not None:
                keys.append(key)
                live = self._forget(key)
                if live is not None:
                    metrics.request_ended(live.leg, "cancelled")
                    if live.trace is not None:
                        live.trace.cancelled()
        if keys:
            self.engine.cancel(keys)
            self._load.changed()

    def _forget(self, key: RequestKey) -> _Live | None:
        live = self._live.pop(key, None)
        if live is not None and live.deadline is not None:
            live.deadline.cancel()
        if not self._live:
            self.idle.set()
        return live

    # The engine's sink.

    def step(self, step: Step) -> None:
        """Distributes what one step produced."""
        touched: set[Session] = set()
        self._start(step)
        self._produce(step, touched)
        self._add_details(step)
        self._finish(step, touched)
        self._hand_off(step, touched)
        for session in touched:
            session.flush()
        self._load.changed()

    def _start(self, step: Step) -> None:
        for start in step.starts:
            if (live := self._live.get(start.key)) is not None:
                live.session.started(live.handle, start)
                metrics.prompt_started(live.leg, live.prompt_tokens, start)
                if live.trace is not None:
                    live.trace.started(start)

    def _produce(self, step: Step, touched: set[Session]) -> None:
        live_of, tokens = self._live, step.tokens
        if len(tokens) == len(step.keys):
            for key, token in zip(step.keys, tokens, strict=True):
                if (live := live_of.get(key)) is not None:
                    live.session.produced_one(live.handle, token)
                    touched.add(live.session)
        else:
            position = 0
            for key, number in zip(step.keys, step.counts, strict=True):
                if (live := live_of.get(key)) is not None:
                    live.session.produced(live.handle, tokens[position : position + number])
                    touched.add(live.session)
                position += number

    def _add_details(self, step: Step) -> None:
        """What goes along with tokens and finishes, for the few requests that want it."""
        for found in step.logprobs:
            if (live := self._live.get(found.key)) is not None:
                live.session.found_logprobs(live.handle, found)
        for found in step.prompt_logprobs:
            if (live := self._live.get(found.key)) is not None:
                live.session.found_prompt_logprobs(live.handle, found)
        for pooled in step.pooled:
            if (live := self._live.get(pooled.key)) is not None:
                live.session.pooled(live.handle, pooled)

    def _finish(self, step: Step, touched: set[Session]) -> None:
        for finish in step.finishes:
            if (live := self._forget(finish.key)) is not None:
                live.session.finished(live.handle, finish)
                metrics.request_ended(live.leg, finish.reason.name.lower())
                if live.trace is not None:
                    live.trace.finished(finish)
                touched.add(live.session)

    def _hand_off(self, step: Step, touched: set[Session]) -> None:
        """Of prompts whose KV now waits to be pulled."""
        for prefilled in step.prefilled:
            if (live := self._forget(prefilled.key)) is not None:
                live.session.prefilled(live.handle, prefilled)
                metrics.prompt_prefilled(live.prompt_tokens, prefilled)
                if live.trace is not None:
                    live.trace.prefilled(prefilled)
                asyncio.get_running_loop().call_later(
                    prefilled.kv_session.time_to_live_seconds,
                    live.session.kept.pop,
                    live.handle,
                    None,
                )
                touched.add(live.session)

    def kv_events(self, events: Sequence[EngineKvEvent]) -> None:
        self._on_kv_events(events)

    def load_changed(self) -> None:
        self._load.changed()

    def failed(self, error: BaseException) -> None:
        """Fails everything; clients move their requests elsewhere."""
        log.error("engine died", requests=len(self._live), exc_info=error)
        lost = WorkerLost("the engine died")
        self.step(
            Step(finishes=[Finish(key, FinishReason.ERROR, lost) for key in list(self._live)])
        )
        self.is_draining = True
        if not self.failure.done():
            self.failure.set_result(error)
