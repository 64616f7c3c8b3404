"""RouterService over relays: frontends' sessions and the plain calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import grpc
from prometheus_client import Gauge

from libs.common import grpc_errors, hashing
from libs.common.duplex import first_message, serve_duplex
from libs.common.errors import (
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NoLiveInstance,
    SwitchgearError,
)
from services.router.core.decision_log import DecisionLog
from services.router.core.workers import InstanceId
from services.router.decider import Decider
from services.router.degraded import Degraded
from services.router.explanation import explanation_of, worker_ref
from services.router.fleet import Fleet
from services.router.live_settings import LiveSettings, as_json
from services.router.overlap_check import OverlapCheck
from services.router.overlap_client import OverlapClient
from services.router.relay import Relay
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.router.v1 import router_pb2, router_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

BUSY_SESSIONS = Gauge(
    "switchgear_router_busy_sessions", "Frontends' sessions and plain calls with requests in them"
)


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Thin handlers; relays do the work."""

    def __init__(
        self, fleet: Fleet, overlaps: OverlapClient, settings: LiveSettings, degraded: Degraded
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._degraded = degraded
        self._log = DecisionLog(settings.start.explained_decisions)
        self._decider = Decider(fleet, overlaps, settings, self._log, Random())
        self._check = OverlapCheck(fleet, degraded)
        self._relays: set[Relay] = set()
        self.closing = asyncio.Event()
        """Set to end all sessions; their frontends then go elsewhere."""
        BUSY_SESSIONS.set_function(lambda: self._busy_sessions)

    @property
    def _busy_sessions(self) -> int:
        # A copy: metrics are read from a thread of their own.
        return sum(not relay.is_idle for relay in list(self._relays))

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._busy_sessions

    def _open(self, news: asyncio.Event, window_responses: int) -> Relay:
        if self.closing.is_set():
            raise NoLiveInstance("the router is shutting down")
        relay = Relay(self._decider, self._check, self._settings.start, news.set, window_responses)
        self._relays.add(relay)
        return relay

    async def _close(self, relay: Relay) -> None:
        self._relays.discard(relay)
        await relay.close()

    # grpc.aio takes a coroutine that writes by itself as well as an iterator.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[router_pb2.SessionRequest], context: Context
    ) -> None:
        """Gives commands to a relay and sends what it has ready."""
        first = await first_message(request_iterator)
        if first is None:
            return
        news = asyncio.Event()
        relay = self._open(news, first.window_responses)
        try:
            relay.command(first)
            await serve_duplex(
                request_iterator,
                context,
                command=relay.command,
                take=relay.outbox.take,
                news=news,
                closing=self.closing,
            )
        finally:
            await self._close(relay)

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """One request in a relay of its own."""
        submit = self._submit_of(request, context.time_remaining())
        news = asyncio.Event()
        relay = self._open(news, window_responses=1)
        consumed = 0
        routed: router_pb2.Routed | None = None
        try:
            relay.submit([submit])
            while True:
                await news.wait()
                news.clear()
                if (message := relay.outbox.take()) is None:
                    continue
                if message.routed:
                    routed = message.routed[-1]
                for response in _responses(message):
                    if routed is not None:
                        response.routed.CopyFrom(routed)
                        routed = None
                    yield response
                    if response.finish_reason:
                        return
                for failure in message.failures:
                    raise grpc_errors.from_message(failure.error)
                consumed += 1
                relay.command(router_pb2.SessionRequest(consumed_responses=consumed))
        finally:
            await self._close(relay)

    def _submit_of(
        self, request: router_pb2.GenerateRequest, timeout_seconds: float | None
    ) -> router_pb2.Submit:
        generation = request.generation
        if not generation.model:
            raise InvalidRequest("generation.model must not be empty", param="model")
        if not generation.token_ids:
            raise InvalidRequest("generation.token_ids must not be empty", param="token_ids")
        if not self._fleet.is_known(generation.model):
            raise ModelNotFound(f"model {generation.model!r} does not exist", param="model")
        sizes = [w.block_size_tokens for w in self._fleet.workers if w.model == generation.model]
        block_size = sizes[0] if sizes else 0
        routing = router_pb2.RoutingRequest(
            request_id=generation.request_id,
            model=generation.model,
            prompt_tokens=len(generation.token_ids),
            block_size_tokens=block_size,
            keeps_prompt_local=(
                generation.logprobs.HasField("prompt_alternatives")
                or generation.HasField("pooling")
            ),
            options=request.options if request.HasField("options") else None,
            traceparent=generation.traceparent,
        )
        if block_size and not generation.logprobs.HasField("prompt_alternatives"):
            routing.sequence_hashes.extend(
                hashing.sequence_hashes(
                    generation.token_ids, block_size, cache_salt=generation.kv.cache_salt
                )
            )
        if timeout_seconds is not None:
            routing.timeout.CopyFrom(grpc_errors.duration_of(timeout_seconds))
        return router_pb2.Submit(
            handle=1, routing=routing, generation=generation.SerializeToString()
        )

    async def SelectWorker(
        self, request: router_pb2.SelectWorkerRequest, context: Context
    ) -> router_pb2.SelectWorkerResponse:
        """The decision as it would be now, with everyone's terms."""
        routing = request.routing
        wishes = self._decider.wishes(routing)
        [found] = await self._decider.find_overlaps([routing], [""])
        record = self._decider.decide(
            routing,
            found,
            wishes,
            excluded=[InstanceId(instance) for instance in routing.excluded_instance_ids],
        )
        if record is None:
            raise self._decider.nobody(routing.model, wishes)
        decision = record.decision
        prefill = decision.prefill
        return router_pb2.SelectWorkerResponse(
            prefill_worker=None if prefill is None else worker_ref(prefill.worker),
            decode_worker=worker_ref(decision.decode.worker),
            explanation=explanation_of(record, asyncio.get_running_loop().time()),
        )

    async def ExplainDecision(
        self, request: router_pb2.ExplainDecisionRequest, context: Context
    ) -> router_pb2.ExplainDecisionResponse:
        """The last decisions, as they were made."""
        now = asyncio.get_running_loop().time()
        found = self._log.find(request.request_id, request.limit)
        return router_pb2.ExplainDecisionResponse(
            explanations=[explanation_of(record, now) for record in found],
            degradations=[router_pb2.Degradation(**lack._asdict()) for lack in self._degraded],
        )

    async def GetSettings(
        self, request: router_pb2.GetSettingsRequest, context: Context
    ) -> router_pb2.GetSettingsResponse:
        """What decisions go by now."""
        settings = self._settings
        return router_pb2.GetSettingsResponse(
            revision=settings.revision,
            settings=[
                router_pb2.Setting(
                    key=setting.name,
                    model=setting.model,
                    value=as_json(setting.value),
                    is_live=setting.is_live,
                )
                for setting in settings.settings()
            ],
            rejected=[
                router_pb2.RejectedSetting(key="/".join(key), value=as_json(value), problem=problem)
                for key, (value, problem) in sorted(settings.rejected.items())
            ],
        )


def _responses(message: router_pb2.SessionResponse) -> list[router_pb2.GenerateResponse]:
    """What a session message says of its only request. Raises its error."""
    responses: list[router_pb2.GenerateResponse] = []
    for serialised in message.outputs:
        outputs = outputs_pb2.StepOutputs.FromString(serialised)
        reason = generation_pb2.FINISH_REASON_UNSPECIFIED
        for finish in outputs.finishes:
            if finish.reason == generation_pb2.FINISH_REASON_ERROR:
                raise _engine_error(finish.error)
            reason = finish.reason
        if outputs.token_ids or reason:
            responses.append(
                router_pb2.GenerateResponse(
                    token_ids=outputs.token_ids,
                    finish_reason=reason,
                    logprobs=outputs.logprobs if outputs.HasField("logprobs") else None,
                    prompt_logprobs=(
                        outputs.prompt_logprobs if outputs.HasField("prompt_logprobs") else None
                    ),
                    pooled=outputs.pooled[0] if outputs.pooled else None,
                )
            )
    return responses


def _engine_error(message: generation_pb2.Error) -> SwitchgearError:
    return grpc_errors.from_message(message) if message.reason else InternalError("engine failed")
