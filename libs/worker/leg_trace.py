"""A worker's spans of one leg that is traced: the leg, its wait, the transfer, prompt and output.

Made when the leg is over, from the moments that the engine tells: nothing happens for each token.
"""

from __future__ import annotations

import time

from libs.common import tracing
from libs.common.tracing import Span, Value
from libs.engine.interface import EngineRequest, Finish, Leg, Prefilled, Start

_NAMES = {Leg.PREFILL: "prefill", Leg.DECODE: "decode", Leg.WHOLE: "prefill and decode"}


class LegTrace:
    """One request's, on one worker."""

    __slots__ = ("_request", "_span", "_start", "_started_at_ns")

    def __init__(self, span: Span, request: EngineRequest) -> None:
        self._span = span
        self._request = request
        self._start: Start | None = None
        self._started_at_ns = 0

    def started(self, start: Start) -> None:
        """The first token is there."""
        self._start = start
        self._started_at_ns = time.time_ns()

    def prefilled(self, prefilled: Prefilled) -> None:
        """The end of a prefill leg."""
        now_ns = time.time_ns()
        self._end_prompt(prefilled.queue_seconds, 0.0, now_ns)
        self._end(now_ns, {"gen_ai.usage.cache_read.input_tokens": prefilled.cached_tokens})

    def finished(self, finish: Finish) -> None:
        """The end of any other, or of one that failed."""
        error = "" if finish.error is None else finish.error.reason
        self._end_output({"gen_ai.response.finish_reasons": (finish.reason.name.lower(),)}, error)

    def cancelled(self) -> None:
        """The end of one that nobody wants any more, which is no error."""
        self._end_output({"switchgear.is_cancelled": True}, "")

    def _end_output(self, facts: dict[str, Value], error: str) -> None:
        now_ns = time.time_ns()
        if (start := self._start) is not None:
            self._end_prompt(start.queue_seconds, start.transfer_seconds, self._started_at_ns)
            if self._request.pooling is None:
                generating = self._span.child("generate", began_at_ns=self._started_at_ns)
                generating.end(ended_at_ns=now_ns)
            facts["gen_ai.usage.cache_read.input_tokens"] = start.cached_tokens
            facts["switchgear.transferred_tokens"] = start.transferred_tokens
        self._end(now_ns, facts, error)

    def _end_prompt(self, queue_seconds: float, transfer_seconds: float, ended_at_ns: int) -> None:
        """Up to the first token. The engine's moments may be some milliseconds off."""
        span, since_ns = self._span, self._span.began_at_ns
        for name, seconds in (("queue", queue_seconds), ("kv transfer", transfer_seconds)):
            if seconds or name == "queue":
                until_ns = min(since_ns + int(seconds * 1e9), ended_at_ns)
                span.child(name, began_at_ns=since_ns).end(ended_at_ns=until_ns)
                since_ns = until_ns
        name = "first token" if self._request.pooling is None else "prompt"
        span.child(name, began_at_ns=since_ns).end(ended_at_ns=ended_at_ns)

    def _end(self, now_ns: int, facts: dict[str, Value], error: str = "") -> None:
        facts["gen_ai.response.id"] = self._request.request_id
        facts["gen_ai.usage.input_tokens"] = len(self._request.prompt)
        self._span.end(facts, error=error, ended_at_ns=now_ns)


def follow(request: EngineRequest) -> LegTrace | None:
    """The trace of a leg that has just come; None when it is not sampled."""
    name = _NAMES[request.leg] if request.pooling is None else "embed"
    span = tracing.follow(request.traceparent, name)
    return None if span is None else LegTrace(span, request)
