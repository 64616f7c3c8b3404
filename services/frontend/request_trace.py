"""The frontend's spans of one request that is traced: the request itself, tokenising, attempts.

Names of attributes are those of OpenTelemetry's semantic conventions for generative AI where these
have one. What people write and models answer is in no span.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

from libs.common import tracing
from libs.common.errors import DeadlineExceeded, InternalError, SwitchgearError
from libs.common.tracing import Kind, Span, Value
from services.frontend.watch import ClientLeft
from switchgear.common.v1 import generation_pb2

if TYPE_CHECKING:
    from services.frontend.completion import Completion
    from services.frontend.embedding import EmbeddingRequest
    from services.frontend.router_session import Inbox

_OPERATIONS = {
    "chatcmpl": "chat",
    "cmpl": "text_completion",
    "embd": "embeddings",
    "pool": "embeddings",
}
_ID = re.compile(r"[0-9a-f]{32}")
_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


class RequestTrace:
    """One completion's. Used by it alone."""

    __slots__ = ("_attempt", "_attempts", "_first_tokens_at_ns", "_operation", "_span")

    def __init__(self, span: Span, operation: str, prompt_tokens: int) -> None:
        self._span = span
        self._operation = operation
        self._attempt: Span | None = None
        self._attempts = 0
        self._first_tokens_at_ns = 0
        span.child("tokenise", began_at_ns=span.began_at_ns).end(
            {"gen_ai.usage.input_tokens": prompt_tokens}
        )

    @property
    def traceparent(self) -> str:
        """Of the whole request."""
        return self._span.traceparent

    def attempt_begins(self) -> str:
        """Gives the traceparent for the router and the workers."""
        self._attempts += 1
        self._attempt = self._span.child("attempt", Kind.CLIENT)
        return self._attempt.traceparent

    def first_tokens(self) -> None:
        """They have come, from the current attempt."""
        self._first_tokens_at_ns = time.time_ns()

    def attempt_ended(self, inbox: Inbox | None = None, *, error: str = "") -> None:
        """The current attempt is over; with an error there may be another one."""
        if self._attempt is None:
            return
        attributes: dict[str, Value] = {"switchgear.attempt": self._attempts}
        if inbox is not None and inbox.routed is not None:
            attributes["switchgear.decode_worker"] = inbox.routed.decode_worker.name
        self._attempt.end(attributes, error=error)
        self._attempt = None

    def end(self, completion: Completion, error: BaseException | None) -> None:
        """The request is over: well, with an error, or because nobody wants it any more."""
        self._end(self._facts(completion), error, completion.request.deadline)

    def end_embedding(
        self, request: EmbeddingRequest, request_id: str, index: int, error: BaseException | None
    ) -> None:
        """The same for one input of an embeddings call."""
        facts: dict[str, Value] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "switchgear",
            "gen_ai.request.model": request.model.name,
            "gen_ai.response.id": request_id,
            "gen_ai.response.model": request.model.name,
            "gen_ai.usage.input_tokens": len(request.inputs[index]),
            "switchgear.attempts": self._attempts,
        }
        self._end(facts, error, request.deadline)

    def _end(self, facts: dict[str, Value], error: BaseException | None, deadline: float) -> None:
        reason = ""
        if isinstance(error, SwitchgearError):
            reason = error.reason
        elif isinstance(error, Exception) and not isinstance(error, ClientLeft):
            reason = InternalError.reason
        elif error is not None:
            is_late = asyncio.get_running_loop().time() >= deadline
            reason = DeadlineExceeded.reason if is_late else "CANCELLED"
        self.attempt_ended(error=reason)
        self._span.end(facts, error=reason)

    def _facts(self, completion: Completion) -> dict[str, Value]:
        request = completion.request
        facts: dict[str, Value] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "switchgear",
            "gen_ai.request.model": request.model.name,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.response.id": request.request_id,
            "gen_ai.response.model": request.model.name,
            "gen_ai.usage.input_tokens": completion.prompt_tokens,
            "gen_ai.usage.output_tokens": completion.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": completion.cached_tokens,
            "switchgear.attempts": self._attempts,
        }
        for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty"):
            if request.sampling.HasField(name):
                facts[f"gen_ai.request.{name}"] = getattr(request.sampling, name)
        if completion.finish_reason in _REASONS:
            facts["gen_ai.response.finish_reasons"] = (_REASONS[completion.finish_reason],)
        if self._first_tokens_at_ns:
            waited_ns = self._first_tokens_at_ns - self._span.began_at_ns
            facts["gen_ai.response.time_to_first_chunk"] = waited_ns / 1e9
        if completion.prefill_worker:
            facts["switchgear.prefill_worker"] = completion.prefill_worker
        if completion.decode_worker:
            facts["switchgear.decode_worker"] = completion.decode_worker
        return facts


def begin(
    request_id: str,
    model: str,
    prompt_tokens: int,
    *,
    traceparent: str,
    ratio: float,
    accepted_at: float,
) -> RequestTrace | None:
    """The trace of a request that was accepted then, in the event loop's time, and has just been
    tokenised; None when it is not sampled.

    A new trace has the number in the request's id for its own, so that each is found by the other,
    and the choices of one answer are one trace.
    """
    if not tracing.is_on():
        return None
    number = _ID.search(request_id)
    operation = _OPERATIONS.get(request_id.partition("-")[0], "text_completion")
    span = tracing.begin(
        traceparent,
        f"{operation} {model}",
        ratio=ratio,
        trace_id=int(number[0], 16) if number else tracing.new_trace_id(),
        began_at_ns=tracing.wall_ns(accepted_at),
    )
    return None if span is None else RequestTrace(span, operation, prompt_tokens)
