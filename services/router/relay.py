"""One frontend's requests on their way: overlap, decision, prefill leg, decode leg, outputs.

Each is in one stage at any time (core/request_stage.py has them), and every method here takes one
or some of them to the next. Whatever goes wrong with the prefill leg, the decode worker computes
the prompt itself. What goes wrong before a decode worker took the request is tried on another one;
what goes wrong later is the frontend's to migrate, which has the tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from libs.common import grpc_errors, logs, tracing
from libs.common.errors import (
    DeadlineExceeded,
    InternalError,
    ProtocolViolation,
    SwitchgearError,
    WorkerLost,
)
from services.router import metrics
from services.router.config import RouterSettings
from services.router.core.decision import Candidate, Decision, Prompt
from services.router.core.decision_log import Record
from services.router.core.held import longest_wait_seconds
from services.router.core.hold import HoldEnd
from services.router.core.request_stage import Remedy, Stage, prefill_seconds, remedy
from services.router.core.workers import Booking, InstanceId, Role, Worker
from services.router.decider import Decider, Found
from services.router.fleet import Member
from services.router.outbox import Outbox
from services.router.overlap_check import OverlapCheck
from services.router.relayed_request import ComputedPrompt, RelayedRequest
from services.router.worker_link import Handle, WorkerLink
from services.router.worker_links import WorkerLinks
from switchgear.common.v1 import outputs_pb2
from switchgear.router.v1 import router_pb2
from switchgear.worker.v1 import worker_pb2

log = logs.get(__name__)

DEADLINE_MARGIN_SECONDS = 0.05
"""What a hop keeps of the deadline, so that the caller hears a specific error and not its own."""


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
        self._decider = decider
        self._check = check
        self._settings = settings
        self._requests: dict[Handle, RelayedRequest] = {}
        """Those that have not ended."""
        self.outbox = Outbox(window_responses, wake)
        self._links = WorkerLinks(
            decider.fleet,
            settings.window_responses,
            run=self._spawn,
            on_response=self._on_response,
            on_end=self._on_link_end,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._requests

    # The frontend.

    def command(self, message: router_pb2.SessionRequest) -> None:
        """Takes one message in. Raises ProtocolViolation."""
        self.outbox.consumed(message.consumed_responses)
        if message.submits:
            self.submit(message.submits)
        # After them: a request may be cancelled in the message that brings it.
        self.cancel(message.cancels)

    def submit(self, submits: Iterable[router_pb2.Submit]) -> None:
        """Starts requests. Raises ProtocolViolation for a handle in use."""
        now = self._loop.time()
        arrived: list[RelayedRequest] = []
        for submit in submits:
            if submit.handle in self._requests:
                raise ProtocolViolation(f"handle {submit.handle} is in use")
            request = RelayedRequest(submit, now)
            self._requests[submit.handle] = request
            arrived.append(request)
        self._spawn(self._ask(arrived))

    def cancel(self, handles: Iterable[Handle]) -> None:
        """Drops requests in whatever stage they are. Unknown handles are ignored."""
        for handle in handles:
            request = self._requests.get(handle)
            if request is not None:
                link = request.link
                self._end(request, is_cancelled=True)
                if link is not None:
                    link.cancel(handle)
                self.outbox.send_routed()

    async def close(self) -> None:
        """Cancels everything; the frontend is gone."""
        self.cancel(list(self._requests))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Asking, deciding, holding.

    async def _ask(self, requests: Sequence[RelayedRequest]) -> None:
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
                self._asked(request, request_found)
            except Exception:
                self._broken(request)

    def _asked(self, request: RelayedRequest, found: Found) -> None:
        """Finds out what the request wishes, and sends it on its way."""
        request.found = found
        if request.trace is not None:
            request.trace.overlaps_found(len(found.overlaps), are_known=found.are_known)
        if request.stage is Stage.ENDED:
            return  # Cancelled meanwhile.
        try:
            request.wishes = self._decider.wishes(request.routing)
        except SwitchgearError as error:
            self._fail(request, error)
            return
        self._proceed(request)

    def _go_on(self, request: RelayedRequest, *, may_hold: bool = True) -> None:
        """Decides again on a request. What goes wrong ends it alone."""
        try:
            self._proceed(request, may_hold=may_hold)
        except Exception:
            self._broken(request)

    def _broken(self, request: RelayedRequest) -> None:
        """Ends a request whose handling has raised what is being handled now."""
        log.exception(
            "routing failed",
            **tracing.log_ids(request.routing.request_id, request.routing.traceparent),
        )
        try:
            if request.stage is not Stage.ENDED:
                if request.link is not None:
                    request.link.cancel(request.handle)
                self._fail(request, InternalError("internal error"))
        finally:
            if request.stage is Stage.HELD:
                # It would be tried for ever.
                self._decider.waiting_room.leave(request.place, HoldEnd.FAILED)

    def _proceed(self, request: RelayedRequest, *, may_hold: bool = True) -> None:
        """Decides and sends the request on its next leg, or holds it while no decode worker has
        room for it."""
        is_held, is_computed = request.stage is Stage.HELD, request.computed is not None
        record = self._decide(request, Prompt.COMPUTED if is_computed else Prompt.OPEN)
        if record is None:
            end = HoldEnd.FAILED
        elif record.decision.has_room:
            end = HoldEnd.SENT
        elif may_hold and (is_held or self._hold(request, record)):
            return
        else:
            end = HoldEnd.EXPIRED
        if is_held:
            self._release(request, end)
        self._trace_decision(request, record)
        if record is None:
            self._fail(request, self._decider.nobody(request.routing.model, request.wishes))
            return
        if is_computed:
            request.record.hand_over(record)
            self._send_to_decode(request, record.decision.decode)
            return
        if is_held:
            request.record.decide_again(record)
        else:
            self._keep(request, record)
        self._begin(request, record.decision)

    def _decide(self, request: RelayedRequest, prompt: Prompt) -> Record | None:
        computed = request.computed
        return self._decider.decide(
            request.routing,
            request.found,
            request.wishes,
            excluded=request.excluded,
            prompt=prompt,
            transfer_backend="" if computed is None else computed.kv_session.transfer_backend,
        )

    @staticmethod
    def _trace_decision(request: RelayedRequest, record: Record | None) -> None:
        if request.trace is not None:
            request.trace.decided(record)

    def _keep(self, request: RelayedRequest, record: Record) -> None:
        request.record = record
        self._decider.keep(record)

    def _hold(self, request: RelayedRequest, record: Record) -> bool:
        """Whether it waits here from now on."""
        now = self._loop.time()
        is_computed = request.computed is not None
        seconds = longest_wait_seconds(
            self._settings.max_held_seconds,
            request.seconds_left(now),
            None if request.computed is None else request.computed.expires_at - now,
        )
        if seconds <= 0:
            return False
        place = self._decider.waiting_room.take_in(
            partial(self._go_on, request),
            record,
            request.arrived_at,
            is_prompt_computed=is_computed,
        )
        if place is None:
            return False
        request.place = place
        expire = partial(self._go_on, request, may_hold=False)
        request.enter(Stage.HELD, self._loop.call_later(seconds, expire))
        if request.trace is not None:
            request.trace.held(record, place.hold)
        if not is_computed:
            # Whoever asks meanwhile hears of it.
            self._keep(request, record)
        request.record.holds += (place.hold,)
        return True

    def _release(self, request: RelayedRequest, end: HoldEnd) -> None:
        """It waits here no longer."""
        self._decider.waiting_room.leave(request.place, end)
        if request.trace is not None:
            request.trace.held_no_longer(end)

    # To the workers.

    def _begin(self, request: RelayedRequest, decision: Decision) -> None:
        """Sends the request on its first leg."""
        metrics.PROMPT_TOKENS.inc(request.routing.prompt_tokens)
        computing = decision.prefill or decision.decode
        metrics.OVERLAP_TOKENS.inc(computing.overlap_blocks * computing.worker.block_size_tokens)
        if decision.prefill is None:
            self._send_to_decode(request, decision.decode)
        else:
            # The decode worker is chosen again when the KV is there, and nothing is booked till
            # then.
            self._send_to_prefill(request, decision.prefill)

    def _send_to_prefill(self, request: RelayedRequest, chosen: Candidate) -> None:
        now = self._loop.time()
        seconds = prefill_seconds(self._settings.prefill_timeout_seconds, request.seconds_left(now))
        give_up = partial(self._prefill_failed, request, chosen.worker, "timeout")
        request.sent_at = now
        request.enter(Stage.PREFILLING, self._loop.call_later(seconds, give_up))
        chosen.worker.book(chosen.booking)
        self._send(request, chosen.worker, worker_pb2.LEG_PREFILL, chosen.booking)

    def _send_to_decode(self, request: RelayedRequest, chosen: Candidate) -> None:
        computed = request.computed
        request.enter(Stage.SENT)
        chosen.worker.book(chosen.booking)
        self.outbox.add_routed(request.handle, chosen.worker, computed)
        (metrics.WHOLE if computed is None else metrics.DISAGGREGATED).inc()
        leg = worker_pb2.LEG_WHOLE if computed is None else worker_pb2.LEG_DECODE
        self._send(request, chosen.worker, leg, chosen.booking)

    def _send(
        self,
        request: RelayedRequest,
        worker: Worker,
        leg: worker_pb2.Leg.ValueType,
        booking: Booking,
    ) -> None:
        """Puts a leg on the worker's link; the booking is already on the worker."""
        link = self._links.open_to(worker)
        if link is None:
            worker.unbook(booking)
            self._leg_lost(request, worker, may_have_run=False)
            return
        now = self._loop.time()
        timeout = None
        if request.deadline is not None:
            timeout = request.deadline - now - DEADLINE_MARGIN_SECONDS
            if timeout <= 0:
                worker.unbook(booking)
                self._fail(request, DeadlineExceeded("the deadline passed in the router"))
                return
        request.link = link
        self._decider.sent(worker, request.routing)
        kv_session = None
        if request.computed is not None:
            # A refusal may have cost some of it. With nothing left the worker does not pull.
            kv_session = request.computed.kv_session
            left = request.computed.expires_at - now
            kv_session.time_to_live.CopyFrom(grpc_errors.duration_of(left))
        link.submit(
            request.handle,
            request.generation,
            leg,
            booking,
            traceparent="" if request.trace is None else request.trace.leg_begins(leg, worker.name),
            timeout_seconds=timeout,
            kv_session=kv_session,
        )

    def _leave(self, request: RelayedRequest, *, is_computed: bool = False) -> None:
        """The request is no longer where it was, if it was anywhere. `is_computed`: a prefill
        worker has its KV."""
        link = request.link
        if link is not None:
            is_computed = is_computed or request.stage is Stage.DECODING
            self._decider.ended(link.worker, request.routing, is_computed=is_computed)
            request.link = None

    # From the workers.

    def _on_response(self, link: WorkerLink, response: worker_pb2.SessionResponse) -> None:
        for prefilled in response.prefilled:
            self._prefilled(prefilled)
        for start in response.starts:
            self._started(link, start)
        for refusal in response.refusals:
            self._refused(link, refusal)
        for handle in response.finished_handles:
            self._finished(link, handle)
        if response.outputs and link.worker.role is Role.DECODE:
            self.outbox.add_outputs(response.outputs, link)
        else:
            link.consumed(1)

    def _on(self, link: WorkerLink, handle: Handle) -> RelayedRequest | None:
        """The request that a worker speaks of; None when it is there no more."""
        request = self._requests.get(handle)
        return request if request is not None and request.link is link else None

    def _prefilled(self, prefilled: worker_pb2.Prefilled) -> None:
        request = self._requests.get(prefilled.handle)
        if request is None or request.stage is not Stage.PREFILLING or request.link is None:
            return  # Cancelled or timed out meanwhile: the cancellation on its way frees the KV.
        now = self._loop.time()
        request.computed = ComputedPrompt(
            request.link.worker,
            prefilled.cached_tokens,
            prefilled.kv_session,
            now + grpc_errors.seconds_of(prefilled.kv_session.time_to_live),
        )
        self._leave(request, is_computed=True)
        metrics.PREFILL_SECONDS.observe(now - request.sent_at)
        if request.trace is not None:
            request.trace.leg_ended()
        record = request.record
        record.prefill_cached_tokens = prefilled.cached_tokens
        if record.decision.prefill is not None:
            self._check.computed(record, record.decision.prefill, prefilled.cached_tokens)
        self._go_on(request)

    def _started(self, link: WorkerLink, start: outputs_pb2.SequenceStart) -> None:
        """The decode worker has the prompt's KV: what it had of it, and what it pulled."""
        request = self._on(link, start.handle)
        if request is None or request.stage is Stage.PREFILLING:
            return
        request.enter(Stage.DECODING)
        record = request.record
        record.decode_cached_tokens = start.cached_tokens
        record.transferred_tokens = start.transferred_tokens
        if not start.transferred_tokens:
            self._check.computed(record, record.decision.decode, start.cached_tokens)

    def _finished(self, link: WorkerLink, handle: Handle) -> None:
        request = self._on(link, handle)
        if request is None:
            return
        if request.stage is Stage.PREFILLING:
            worker = link.worker
            self._leave(request)
            self._prefill_failed(request, worker, "engine")
        else:
            self._end(request)

    def _refused(self, link: WorkerLink, refusal: worker_pb2.Refusal) -> None:
        request = self._on(link, refusal.handle)
        if request is not None:
            error = grpc_errors.from_message(refusal.error)
            self._leg_failed(request, link.worker, error, can_be_repeated=error.is_retryable)

    def _on_link_end(self, link: WorkerLink, member: Member, reason: str) -> None:
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

    # Legs that fail.

    def _leg_lost(self, request: RelayedRequest, worker: Worker, *, may_have_run: bool) -> None:
        error = WorkerLost(f"{worker.name} was lost")
        self._leg_failed(request, worker, error, can_be_repeated=not may_have_run)

    def _leg_failed(
        self,
        request: RelayedRequest,
        worker: Worker,
        error: SwitchgearError,
        *,
        can_be_repeated: bool,
    ) -> None:
        self._leave(request)
        if request.trace is not None:
            request.trace.leg_ended(error.reason)
        match remedy(request.stage, can_be_repeated=can_be_repeated):
            case Remedy.PREFILL_THERE:
                self._prefill_failed(request, worker, error.reason.lower())
            case Remedy.ELSEWHERE:
                request.excluded.add(worker.instance_id)
                self._redecide(request, otherwise=error)
            case Remedy.HAND_BACK:
                # Whom the frontend leaves out, if it tries again.
                failed = worker.instance_id if error.is_retryable else None
                self._fail(request, error, failed)

    def _prefill_failed(self, request: RelayedRequest, worker: Worker, reason: str) -> None:
        """The decode worker computes the prompt itself."""
        log.warning(
            "prefill leg failed",
            **tracing.log_ids(request.routing.request_id, request.routing.traceparent),
            worker=worker.name,
            reason=reason,
        )
        metrics.PREFILL_FALLBACKS.labels(reason).inc()
        if request.trace is not None:
            request.trace.leg_ended(reason.upper())
        if request.link is not None:
            request.link.cancel(request.handle)
            self._leave(request)
        self._redecide(
            request, otherwise=self._decider.nobody(request.routing.model, request.wishes)
        )

    def _redecide(self, request: RelayedRequest, otherwise: SwitchgearError) -> None:
        """Chooses a decode worker when a leg failed. Without one the request fails."""
        prompt = Prompt.LOCAL if request.computed is None else Prompt.COMPUTED
        record = self._decide(request, prompt)
        self._trace_decision(request, record)
        if record is None:
            self._fail(request, otherwise)
        else:
            self._keep(request, record)
            self._send_to_decode(request, record.decision.decode)

    # The end.

    def _fail(
        self, request: RelayedRequest, error: SwitchgearError, failed: InstanceId | None = None
    ) -> None:
        metrics.FAILURES.labels(error.reason).inc()
        self._end(request, error.reason)
        self.outbox.add_failure(request.handle, error, failed)

    def _end(self, request: RelayedRequest, error: str = "", *, is_cancelled: bool = False) -> None:
        self._requests.pop(request.handle, None)
        if request.stage is Stage.HELD:
            self._release(request, HoldEnd.CANCELLED if is_cancelled else HoldEnd.FAILED)
            if request.computed is not None:
                # Nobody pulls the KV that waits for it.
                keeper = self._links.get(request.computed.worker.instance_id)
                if keeper is not None:
                    keeper.cancel(request.handle)
        if request.trace is not None:
            request.trace.end(error, is_cancelled=is_cancelled)
            request.trace = None
        self._leave(request)
        request.enter(Stage.ENDED)

    # Tasks.

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)

    def _spawned_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("relay task failed", exc_info=error)
