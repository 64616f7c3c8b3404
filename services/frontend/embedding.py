"""One embeddings call on its way: inputs in, vectors out, in parallel and within a bound."""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from libs.common import tracing
from libs.common.errors import InternalError
from libs.common.hashing import sequence_hashes
from services.frontend import request_trace
from services.frontend.access import Reservation
from services.frontend.completion import LONG_PROMPT_TOKENS
from services.frontend.core.attempt import Attempts, MigrationPolicy
from services.frontend.metrics import FrontendMetrics
from services.frontend.models import ServedModel
from services.frontend.recovery import recovered
from services.frontend.request_trace import RequestTrace
from services.frontend.router_session import Inbox, RouterSessions
from switchgear.common.v1 import generation_pb2, routing_pb2
from switchgear.router.v1 import router_pb2

MAX_INPUTS = 2048
"""Of one call, as OpenAI has it."""


def floats_of(vector: bytes) -> array[float]:
    """The numbers of a vector, from 32-bit floats, little-endian."""
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """What to embed, checked against the model."""

    request_id: str
    """Unique. Each input's own request is named after it and its place."""
    model: ServedModel
    inputs: Sequence[list[int]]
    dimensions: int | None = None
    cache_salt: str = ""
    priority: int = 0
    reservation: Reservation | None = None
    """Tokens taken from the caller's limit until it is known how many were used."""
    traceparent: str = ""
    """The caller's; empty when there is none."""
    trace_sample_ratio: float = 0.0
    routing: routing_pb2.RoutingOptions | None = None
    max_parallel_inputs: int
    accepted_at: float
    """In the event loop's time, as is the deadline."""
    deadline: float


class Embedding:
    """The vectors of one call. Each input is a request of its own to the routers."""

    def __init__(
        self,
        request: EmbeddingRequest,
        sessions: RouterSessions,
        policy: MigrationPolicy,
        metrics: FrontendMetrics,
    ) -> None:
        self.request = request
        self.cached_tokens = 0
        """Input tokens that workers had cached, of the inputs that are done."""
        self._sessions = sessions
        self._policy = policy
        self._metrics = metrics
        self._model_metrics = metrics.of(request.model.name)
        self._embedded = 0
        """Inputs that are done."""
        self._embedded_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.request.inputs))

    async def run(self) -> list[bytes]:
        """The vectors, in the order of the inputs: 32-bit floats, little-endian.

        Raises the SwitchgearError of the first input that fails; the others are cancelled then.
        """
        request = self.request
        vectors = [b""] * len(request.inputs)
        left = iter(range(len(vectors)))

        async def embed_one_after_another() -> None:
            for index in left:
                vectors[index] = await self._embed(index)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(request.max_parallel_inputs, len(vectors))):
                    group.create_task(embed_one_after_another())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            if request.reservation is not None:
                request.reservation.settle(self._embedded_tokens)
        seconds = asyncio.get_running_loop().time() - request.accepted_at
        self._model_metrics.request_seconds.observe(seconds)
        return vectors

    async def _embed(self, index: int) -> bytes:
        request = self.request
        request_id = f"{request.request_id}-{index}" if index else request.request_id
        trace = request_trace.begin(
            request_id,
            request.model.name,
            len(request.inputs[index]),
            traceparent=request.traceparent,
            ratio=request.trace_sample_ratio,
            accepted_at=request.accepted_at,
        )
        try:
            inbox = await self._read(index, request_id, trace)
        finally:
            if trace is not None:
                trace.end_embedding(request, request_id, index, sys.exception())
        if not inbox.pooled:
            raise InternalError("the worker sent no vector")
        self._count(index, inbox)
        return inbox.pooled

    async def _read(self, index: int, request_id: str, trace: RequestTrace | None) -> Inbox:
        """The answer to one input, from whichever attempt at it went well."""
        request = self.request
        attempts = Attempts(
            prompt=request.inputs[index],
            max_tokens=1,
            min_tokens=0,
            policy=self._policy,
            is_worth_waiting=bool(self._embedded),
        )
        while True:
            traceparent = request.traceparent if trace is None else trace.attempt_begins()
            inbox = await self._submit(attempts, request_id, traceparent)
            try:
                while not inbox.is_over:
                    await inbox.take()
            finally:
                inbox.close()
            if trace is not None:
                trace.attempt_ended(inbox, error=inbox.error.reason if inbox.error else "")
            if inbox.error is None:
                return inbox
            if not await recovered(
                attempts,
                inbox.error,
                inbox.failed_instance_id,
                self._metrics.migrations.labels(request.model.name, inbox.error.reason),
                tracing.log_ids(request_id, traceparent),
            ):
                raise inbox.error

    async def _submit(self, attempts: Attempts, request_id: str, traceparent: str) -> Inbox:
        request = self.request
        facts, prompt, salt = request.model.facts, attempts.prompt, request.cache_salt

        def commands() -> tuple[router_pb2.RoutingRequest, bytes]:
            routing = router_pb2.RoutingRequest(
                request_id=request_id,
                model=facts.name,
                prompt_tokens=len(prompt),
                block_size_tokens=facts.kv_block_size_tokens,
                sequence_hashes=sequence_hashes(
                    prompt, facts.kv_block_size_tokens, cache_salt=salt
                ),
                excluded_instance_ids=attempts.excluded_instance_ids,
                options=request.routing,
                keeps_prompt_local=True,
                traceparent=traceparent,
            )
            generation = generation_pb2.Generation(
                request_id=request_id,
                model=facts.name,
                token_ids=prompt,
                kv=generation_pb2.KvOptions(cache_salt=salt),
                priority=request.priority,
                traceparent=traceparent,
                pooling=generation_pb2.PoolingOptions(
                    task=generation_pb2.POOLING_TASK_EMBED, dimensions=request.dimensions
                ),
            )
            return routing, generation.SerializeToString()

        is_long = len(prompt) > LONG_PROMPT_TOKENS
        routing, generation = await asyncio.to_thread(commands) if is_long else commands()
        return await self._sessions.submit_in_time(
            routing,
            generation,
            deadline=request.deadline,
            patience_seconds=self._policy.patience_seconds,
        )

    def _count(self, index: int, inbox: Inbox) -> None:
        tokens = len(self.request.inputs[index])
        cached_tokens = inbox.start.cached_tokens if inbox.start is not None else 0
        self._embedded += 1
        self._embedded_tokens += tokens
        self.cached_tokens += cached_tokens
        self._model_metrics.prompt_tokens.inc(tokens)
        self._model_metrics.cached_tokens.inc(cached_tokens)
