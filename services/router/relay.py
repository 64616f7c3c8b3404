"""One frontend's requests on their way: overlap, decision, prefill leg, decode leg, outputs.

A request is routed (its overlap is asked for), prefilled (a prefill worker computes its prompt),
then decoding (a decode worker, chosen once the KV is there, has it, and its outputs pass through
undecoded). Before that it is held while no decode worker has room for it, for some time. Whatever
goes wrong with the prefill leg, the decode worker computes the prompt itself. What goes wrong
before a decode worker took the request is tried on another one; what goes wrong later is the
frontend's to migrate, which has the tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

import grpc
from prometheus_client import Counter, Histogram

from libs.common import grpc_errors, logs, tracing
from libs.common.credit import Credit
from libs.common.errors import (
    BY_REASON,
    DeadlineExceeded,
    InternalError,
    ProtocolViolation,
    SwitchgearError,
    WorkerLost,
)
from libs.common.metrics import count_from_zero
from services.router import request_trace
from services.router.config import RouterSettings
from services.router.core.decision import Candidate, Prompt
from services.router.core.decision_log import Record
from services.router.core.held import LEASE_PART
from services.router.core.workers import Booking, InstanceId, Role, Worker
from services.router.decider import Decider, Found
from services.router.fleet import Member
from services.router.overlap_check import OverlapCheck
from services.router.routing_options import Wishes
from services.router.worker_link import Handle, WorkerLink
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.router.v1 import router_pb2
from switchgear.worker.v1 import worker_pb2

log = logs.get(__name__)

DEADLINE_MARGIN_SECONDS = 0.05
"""What a hop keeps of the deadline, so that the caller hears a specific error and not its own."""

MAX_OUTPUTS_BYTES = 16 << 20
"""Of what several workers sent, in one message: it has a size limit, and vectors that wait for a
slow frontend are many times as large as tokens."""

REQUESTS = Counter(
    "switchgear_router_requests_total", "Requests given to a decode worker, by how", ["mode"]
)
_WHOLE, _DISAGGREGATED = REQUESTS.labels("whole"), REQUESTS.labels("disaggregated")
PREFILL_FALLBACKS = Counter(
    "switchgear_router_prefill_fallbacks_total",
    "Prompts that a decode worker computed because the prefill leg failed",
    ["reason"],
)
# The router's own reasons, and those of refusals.
count_from_zero(
    PREFILL_FALLBACKS, ["timeout", "worker_lost", "engine", *(each.lower() for each in BY_REASON)]
)
PREFILL_SECONDS = Histogram(
    "switchgear_router_prefill_leg_seconds",
    "From giving a prompt to a prefill worker to its KV being there.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
FAILURES = Counter(
    "switchgear_router_failures_total", "Requests handed back to the frontend", ["reason"]
)
count_from_zero(FAILURES, BY_REASON)
PROMPT_TOKENS = Counter(
    "switchgear_router_prompt_tokens_total", "Prompt tokens of requests that were routed"
)
OVERLAP_TOKENS = Counter(
    "switchgear_router_overlap_tokens_total",
    "Prompt tokens that the chosen worker was known to hold",
)


class _Request:
    """A request that has not ended."""

    __slots__ = (
        "arrived_at",
        "deadline",
        "excluded",
        "found",
        "generation",
        "handle",
        "has_started",
        "hold_timer",
        "kv_expires_at",
        "kv_session",
        "link",
        "prefill",
        "prefill_began_at",
        "prefill_cached_tokens",
        "prefill_timer",
        "record",
        "retry",
        "routing",
        "trace",
        "wishes",
    )

    def __init__(self, submit: router_pb2.Submit, now: float) -> None:
        self.handle: Handle = submit.handle
        self.arrived_at = now
        self.routing = submit.routing
        self.generation: bytes = submit.generation
        self.deadline: float | None = None
        if submit.routing.HasField("timeout"):
            self.deadline = now + grpc_errors.seconds_of(submit.routing.timeout)
        self.excluded = set(map(InstanceId, submit.routing.excluded_instance_ids))
        self.found = Found({}, are_known=True)
        self.trace = request_trace.follow(submit.routing)
        """None when it is not sampled, and once it has ended."""
        self.wishes: Wishes
        """Set when it is first decided on, with `record`."""
        self.record: Record
        """Of the last decision."""
        self.link: WorkerLink | None = None
        """Where it is now; None while the overlap is asked for."""
        self.has_started = False
        """Whether that worker has the prompt's KV."""
        self.prefill: Worker | None = None
        """Who computes or has computed the prompt."""
        self.prefill_began_at = 0.0
        """In the event loop's seconds."""
        self.prefill_timer: asyncio.TimerHandle | None = None
        self.prefill_cached_tokens = 0
        self.retry: Callable[[], None] | None = None
        """What it is held by; None when it is not."""
        self.hold_timer: asyncio.TimerHandle | None = None
        self.kv_session: generation_pb2.KvSessionRef | None = None
        self.kv_expires_at = 0.0
        """End of `kv_session`, in the event loop's seconds."""

    @property
    def is_prefilling(self) -> bool:
        return self.prefill_timer is not None


class Relay:
    """One frontend session."""

    def __init__(
        self,
        decider: Decider,
        check: OverlapCheck,
        settings: RouterSettings,
        wake: Callable[[], None],
        window_responses: int,
    ) -> None:
        """`wake` is called whenever there may be something to take."""
        self._credit = Credit(window_responses)
        self._decider = decider
        self._check = check
        self._settings = settings
        self._wake = wake
        self._requests: dict[Handle, _Request] = {}
        self._links: dict[InstanceId, WorkerLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pending = router_pb2.SessionResponse()
        self._pending_links: list[WorkerLink] = []
        """For each of the pending outputs, where it came from."""
        self._pending_bytes = 0
        """Of all pending outputs."""
        self._is_dirty = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._requests

    # From the frontend.

    def command(self, request: router_pb2.SessionRequest) -> None:
        """Takes one message in. Raises ProtocolViolation."""
        self._credit.consumed(request.consumed_responses)
        if self._is_dirty:
            self._wake()
        if request.submits:
            self.submit(request.submits)
        # After them: a request may be cancelled in the message that brings it.
        self.cancel(request.cancels)

    def submit(self, submits: Iterable[router_pb2.Submit]) -> None:
        """Starts requests. Raises ProtocolViolation for a handle in use."""
        now = self._loop.time()
        arrived: list[_Request] = []
        for submit in submits:
            if submit.handle in self._requests:
                raise ProtocolViolation(f"handle {submit.handle} is in use")
            request = _Request(submit, now)
            self._requests[submit.handle] = request
            arrived.append(request)
        self._spawn(self._route(arrived))

    def cancel(self, handles: Iterable[Handle]) -> None:
        """Drops requests at whatever leg they are. Unknown handles are ignored."""
        for handle in handles:
            request = self._requests.get(handle)
            if request is not None:
                link = request.link
                self._end(request, is_cancelled=True)
                if link is not None:
                    link.cancel(handle)
                if self._pending.routed:
                    # Nothing may follow that would take it along.
                    self._touch()

    def take(self) -> router_pb2.SessionResponse | None:
        """The next message to send, with everything there is; None when there is nothing, or no
        credit."""
        if not self._is_dirty or self._credit.is_exhausted:
            return None
        response, self._pending = self._pending, router_pb2.SessionResponse()
        links, self._pending_links = self._pending_links, []
        self._is_dirty = False
        if self._pending_bytes > MAX_OUTPUTS_BYTES and len(links) > 1:
            self._put_back(response, links)
        else:
            self._pending_bytes = 0
        self._credit.sent()
        for link in links:
            link.consumed(1)
        return response

    def _put_back(self, response: router_pb2.SessionResponse, links: list[WorkerLink]) -> None:
        """Leaves outputs beyond the limit for the next message, and failures, which come last."""
        kept_bytes = number = 0
        while not number or kept_bytes + len(response.outputs[number]) <= MAX_OUTPUTS_BYTES:
            kept_bytes += len(response.outputs[number])
            number += 1
        self._pending.outputs.extend(response.outputs[number:])
        self._pending.failures.extend(response.failures)
        self._pending_links = links[number:]
        self._pending_bytes -= kept_bytes
        del response.outputs[number:], links[number:]
        response.ClearField("failures")
        self._touch()

    async def close(self) -> None:
        """Cancels everything; the frontend is gone."""
        self.cancel(list(self._requests))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Routing.

    async def _route(self, requests: Sequence[_Request]) -> None:
        try:
            found = await self._decider.find_overlaps(
                [request.routing for request in requests],
                ["" if r.trace is None else r.trace.overlaps_asked() for r in requests],
            )
        except Exception:
            for request in requests:
                self._broken(request)
            return
        for request, request_found in zip(requests, found, strict=True):
            try:
                self._dispatch(request, request_found)
            except Exception:
                self._broken(request)

    def _dispatch(self, request: _Request, found: Found) -> None:
        """Finds out what the request wishes, and sends it on its way."""
        request.found = found
        if request.trace is not None:
            request.trace.overlaps_found(len(found.overlaps), are_known=found.are_known)
        if self._requests.get(request.handle) is not request:
            return
        try:
            request.wishes = self._decider.wishes(request.routing)
        except SwitchgearError as error:
            self._fail(request, error)
            return
        self._proceed(request)

    def _go_on(self, request: _Request, *, may_hold: bool = True) -> None:
        """Decides again on a request. What goes wrong ends it alone."""
        try:
            self._proceed(request, may_hold=may_hold)
        except Exception:
            self._broken(request)

    def _broken(self, request: _Request) -> None:
        """Ends a request whose handling has raised what is being handled now."""
        log.exception(
            "routing failed",
            **tracing.log_ids(request.routing.request_id, request.routing.traceparent),
        )
        try:
            if self._requests.get(request.handle) is request:
                if request.link is not None:
                    request.link.cancel(request.handle)
                self._fail(request, InternalError("internal error"))
        finally:
            # It would be tried for ever.
            self._hold_no_longer(request)

    def _proceed(self, request: _Request, *, may_hold: bool = True) -> None:
        """Decides and sends the request on its next leg, or holds it while no decode worker has
        room for it."""
        is_computed = request.kv_session is not None
        record = self._decide(request, Prompt.COMPUTED if is_computed else Prompt.OPEN)
        if record is None:
            self._trace_decision(request, None)
            self._fail(request, self._nobody(request))
        elif may_hold and not record.decision.has_room and self._hold(request, record):
            return
        elif is_computed:
            self._hold_no_longer(request)
            self._trace_decision(request, record)
            request.record.hand_over(record)
            self._decode(request, record.decision.decode)
        else:
            self._hold_no_longer(request)
            self._begin(request, record)

    def _hold(self, request: _Request, record: Record) -> bool:
        """Whether it is to wait here."""
        if request.retry is not None:
            return True
        now = self._loop.time()
        seconds = self._settings.max_held_seconds
        if request.deadline is not None:
            seconds = min(seconds, (request.deadline - now) / 2)
        if request.kv_session is not None:
            seconds = min(seconds, (request.kv_expires_at - now) * LEASE_PART)
        retry = partial(self._go_on, request)
        if seconds <= 0 or not self._decider.waiting_room.add(retry, record, request.arrived_at):
            return False
        request.retry = retry
        request.hold_timer = self._loop.call_later(
            seconds, partial(self._go_on, request, may_hold=False)
        )
        return True

    def _hold_no_longer(self, request: _Request) -> None:
        if request.retry is not None:
            self._decider.waiting_room.remove(request.retry, request.routing.model)
            request.retry = None
        if request.hold_timer is not None:
            request.hold_timer.cancel()
            request.hold_timer = None

    def _begin(self, request: _Request, record: Record) -> None:
        """Sends the request on its first leg."""
        self._trace_decision(request, record)
        self._keep(request, record)
        decision = record.decision
        PROMPT_TOKENS.inc(request.routing.prompt_tokens)
        computing = decision.prefill or decision.decode
        OVERLAP_TOKENS.inc(computing.overlap_blocks * computing.worker.block_size_tokens)
        if decision.prefill is None:
            self._decode(request, decision.decode)
            return
        # The decode worker is chosen again when the KV is there, and nothing is booked until then.
        request.prefill = decision.prefill.worker
        request.prefill_began_at = self._loop.time()
        seconds = self._settings.prefill_timeout_seconds
        if request.deadline is not None:
            # Half of what is left stays for computing the prompt after all.
            seconds = min(seconds, max(0.0, request.deadline - self._loop.time()) / 2)
        request.prefill_timer = self._loop.call_later(
            seconds, partial(self._prefill_failed, request, "timeout")
        )
        decision.prefill.worker.book(decision.prefill.booking)
        self._send(
            request, decision.prefill.worker, worker_pb2.LEG_PREFILL, decision.prefill.booking
        )

    def _decide(self, request: _Request, prompt: Prompt) -> Record | None:
        session = request.kv_session
        return self._decider.decide(
            request.routing,
            request.found,
            request.wishes,
            excluded=request.excluded,
            prompt=prompt,
            transfer_backend="" if session is None else session.transfer_backend,
        )

    @staticmethod
    def _trace_decision(request: _Request, record: Record | None) -> None:
        if request.trace is not None:
            request.trace.decided(record)

    def _keep(self, request: _Request, record: Record) -> None:
        request.record = record
        self._decider.keep(record)

    def _nobody(self, request: _Request) -> SwitchgearError:
        return self._decider.nobody(request.routing.model, request.wishes)

    def _decode(self, request: _Request, chosen: Candidate) -> None:
        worker = chosen.worker
        worker.book(chosen.booking)
        # Goes with the first outputs, or whatever else is sent before: nobody waits for it.
        routed = self._pending.routed.add(handle=request.handle)
        decode_worker = routed.decode_worker
        decode_worker.instance_id = worker.instance_id
        decode_worker.name = worker.name
        leg = worker_pb2.LEG_WHOLE
        if request.kv_session is not None and request.prefill is not None:
            leg = worker_pb2.LEG_DECODE
            routed.prefill_worker.instance_id = request.prefill.instance_id
            routed.prefill_worker.name = request.prefill.name
            routed.prefill_cached_tokens = request.prefill_cached_tokens
        (_WHOLE if request.kv_session is None else _DISAGGREGATED).inc()
        self._send(request, worker, leg, chosen.booking)

    def _send(
        self, request: _Request, worker: Worker, leg: worker_pb2.Leg.ValueType, booking: Booking
    ) -> None:
        """Puts a leg on the worker's link; the booking is already on the worker."""
        link = self._link_to(worker)
        timeout = None
        if request.deadline is not None:
            timeout = request.deadline - self._loop.time() - DEADLINE_MARGIN_SECONDS
        if link is None or (timeout is not None and timeout <= 0):
            worker.unbook(booking)
            if link is None:
                self._leg_lost(request, worker, may_have_run=False)
            else:
                self._fail(request, DeadlineExceeded("the deadline passed in the router"))
            return
        request.link = link
        self._decider.sent(worker, request.routing)
        if request.kv_session is not None:
            # A refusal may have cost some of it. With nothing left the worker does not pull.
            left = request.kv_expires_at - self._loop.time()
            request.kv_session.time_to_live.CopyFrom(grpc_errors.duration_of(left))
        link.submit(
            request.handle,
            request.generation,
            leg,
            booking,
            traceparent="" if request.trace is None else request.trace.leg_begins(leg, worker.name),
            timeout_seconds=timeout,
            kv_session=request.kv_session if leg == worker_pb2.LEG_DECODE else None,
        )

    def _leave(self, request: _Request) -> None:
        """The request is no longer where it was, if it was anywhere."""
        if request.link is not None:
            self._decider.ended(
                request.link.worker, request.routing, is_computed=request.has_started
            )
            request.link = None
            request.has_started = False

    def _link_to(self, worker: Worker) -> WorkerLink | None:
        link = self._links.get(worker.instance_id)
        if link is None:
            member = self._decider.fleet.members.get(worker.instance_id)
            if member is None or not worker.is_available:
                return None
            link = WorkerLink(
                worker, member.stub, self._settings.window_responses, self._on_response
            )
            self._links[worker.instance_id] = link
            self._spawn(self._run(link, member))
        return link

    # From the workers.

    async def _run(self, link: WorkerLink, member: Member) -> None:
        reason = "the worker ended the session"
        member.link_opened()
        try:
            await link.run()
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        finally:
            member.link_closed()
            del self._links[link.worker.instance_id]
            on_it = [request for request in self._requests.values() if request.link is link]
            if on_it:
                log.warning(
                    "worker lost with requests",
                    worker=link.worker.name,
                    address=member.address,
                    requests=len(on_it),
                    reason=reason,
                )
            for request in on_it:
                self._leg_lost(request, link.worker, may_have_run=link.was_answered)

    def _leg_lost(self, request: _Request, worker: Worker, *, may_have_run: bool) -> None:
        request.excluded.add(worker.instance_id)
        self._leave(request)
        error = WorkerLost(f"{worker.name} was lost")
        if request.trace is not None:
            request.trace.leg_ended(error.reason)
        if request.is_prefilling:
            self._prefill_failed(request, "worker_lost")
        elif may_have_run:
            self._fail(request, error, worker.instance_id)
        else:
            self._redecide(request, otherwise=error)

    def _on_response(self, link: WorkerLink, response: worker_pb2.SessionResponse) -> None:
        for prefilled in response.prefilled:
            self._prefilled(prefilled)
        for start in response.starts:
            self._started(link, start)
        for refusal in response.refusals:
            self._refused(link, refusal)
        for handle in response.finished_handles:
            request = self._requests.get(handle)
            if request is None or request.link is not link:
                continue
            if request.is_prefilling:
                self._leave(request)
                self._prefill_failed(request, "engine")
            else:
                self._end(request)
        if response.outputs and link.worker.role is Role.DECODE:
            self._pending.outputs.append(response.outputs)
            self._pending_links.append(link)
            self._pending_bytes += len(response.outputs)
            self._touch()
        else:
            link.consumed(1)

    def _prefilled(self, prefilled: worker_pb2.Prefilled) -> None:
        request = self._requests.get(prefilled.handle)
        if request is None or not request.is_prefilling:
            return  # Cancelled or timed out meanwhile: the cancellation on its way frees the KV.
        self._stop_prefill_timer(request)
        request.has_started = True
        self._leave(request)
        request.kv_session = prefilled.kv_session
        request.kv_expires_at = self._loop.time() + grpc_errors.seconds_of(
            prefilled.kv_session.time_to_live
        )
        PREFILL_SECONDS.observe(self._loop.time() - request.prefill_began_at)
        request.prefill_cached_tokens = prefilled.cached_tokens
        if request.trace is not None:
            request.trace.leg_ended()
        record = request.record
        record.prefill_cached_tokens = prefilled.cached_tokens
        if record.decision.prefill is not None:
            self._check.computed(record, record.decision.prefill, prefilled.cached_tokens)
        self._go_on(request)

    def _started(self, link: WorkerLink, start: outputs_pb2.SequenceStart) -> None:
        """The decode worker has the prompt's KV: what it had of it, and what it pulled."""
        request = self._requests.get(start.handle)
        if request is None or request.link is not link or request.is_prefilling:
            return
        request.has_started = True
        record = request.record
        record.decode_cached_tokens = start.cached_tokens
        record.transferred_tokens = start.transferred_tokens
        if not start.transferred_tokens:
            self._check.computed(record, record.decision.decode, start.cached_tokens)

    def _prefill_failed(self, request: _Request, reason: str) -> None:
        """The decode worker computes the prompt itself."""
        if not request.is_prefilling:
            return
        assert request.prefill is not None
        log.warning(
            "prefill leg failed",
            **tracing.log_ids(request.routing.request_id, request.routing.traceparent),
            worker=request.prefill.name,
            reason=reason,
        )
        PREFILL_FALLBACKS.labels(reason).inc()
        if request.trace is not None:
            request.trace.leg_ended(reason.upper())
        self._stop_prefill_timer(request)
        if request.link is not None:
            request.link.cancel(request.handle)
            self._leave(request)
        request.prefill = None
        self._redecide(request, self._nobody(request))

    def _redecide(self, request: _Request, otherwise: SwitchgearError) -> None:
        """Chooses a decode worker when a leg failed. Without one the request fails."""
        prompt = Prompt.LOCAL if request.kv_session is None else Prompt.COMPUTED
        record = self._decide(request, prompt)
        self._trace_decision(request, record)
        if record is None:
            self._fail(request, otherwise)
        else:
            self._keep(request, record)
            self._decode(request, record.decision.decode)

    def _refused(self, link: WorkerLink, refusal: worker_pb2.Refusal) -> None:
        request = self._requests.get(refusal.handle)
        if request is None or request.link is not link:
            return
        self._leave(request)
        if request.is_prefilling:
            self._prefill_failed(request, refusal.error.reason.lower())
            return
        error = grpc_errors.from_message(refusal.error)
        if request.trace is not None:
            request.trace.leg_ended(error.reason)
        if not error.is_retryable:
            self._fail(request, error)
            return
        request.excluded.add(link.worker.instance_id)
        self._redecide(request, otherwise=error)

    # The end.

    def _fail(
        self, request: _Request, error: SwitchgearError, instance_id: InstanceId | None = None
    ) -> None:
        FAILURES.labels(error.reason).inc()
        self._end(request, error.reason)
        self._pending.failures.add(
            handle=request.handle,
            error=grpc_errors.to_message(error),
            failed_instance_id=instance_id or 0,
        )
        self._touch()

    def _end(self, request: _Request, error: str = "", *, is_cancelled: bool = False) -> None:
        self._requests.pop(request.handle, None)
        if request.trace is not None:
            request.trace.end(error, is_cancelled=is_cancelled)
            request.trace = None
        self._leave(request)
        self._stop_prefill_timer(request)
        if request.retry is not None and request.prefill is not None:
            # Nobody pulls the KV that waits for it.
            keeper = self._links.get(request.prefill.instance_id)
            if keeper is not None:
                keeper.cancel(request.handle)
        self._hold_no_longer(request)

    @staticmethod
    def _stop_prefill_timer(request: _Request) -> None:
        if request.prefill_timer is not None:
            request.prefill_timer.cancel()
            request.prefill_timer = None

    def _touch(self) -> None:
        self._is_dirty = True
        self._wake()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)

    def _spawned_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("relay task failed", exc_info=error)
