"""A run for the trace: a few requests with nothing beside them."""

from __future__ import annotations

import secrets
import time

import httpx

from deploy.local.topology import Engine
from deploy.pictures.collector import Collector, ReceivedSpan
from deploy.pictures.load import document
from deploy.pictures.observed import Report, RunFailed, observed
from deploy.pictures.recording import Trace, TraceSpan

REQUESTS = 4
"""The first of them meet what is slow only once."""
OUTPUT_TOKENS = 24
CALL_SECONDS = 120.0
SPAN_SECONDS = 20.0
"""How long the spans of an answered request may be on their way."""

FOLLOWED = frozenset(
    {"tokenise", "attempt", "route", "find overlaps", "decide", "prefill leg", "prefill"}
    | {"decode leg", "decode", "queue", "kv transfer", "first token", "generate"}
)
"""Names of the spans that a disaggregated request has, beside the first."""

_POLL_SECONDS = 0.2


def trace(engine: Engine, report: Report) -> Trace:
    """The quickest of some disaggregated requests. Raises RunFailed and ClusterError."""
    with observed(engine, decode=1, flags={}, report=report) as it:
        traces = []
        with httpx.Client(base_url=it.url, timeout=CALL_SECONDS, trust_env=False) as client:
            for number in range(REQUESTS):
                trace_id = secrets.token_hex(16)
                _send(client, it.deployment.model_name, trace_id)
                traces.append((trace_id, _spans_of(it.collector, trace_id)))
                report(f"request {number + 1} of {REQUESTS}: {_seconds(traces[-1][1]):.3f} s")
        trace_id, spans = min(traces, key=lambda each: _seconds(each[1]))
        return Trace(
            deployment=it.in_words(),
            trace_id=trace_id,
            spans=tuple(_kept(span) for span in spans),
        )


def _send(client: httpx.Client, model: str, trace_id: str) -> None:
    body = {
        "model": model,
        "messages": document(trace_id, sentences=12),
        "max_tokens": OUTPUT_TOKENS,
    }
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    response = client.post("/v1/chat/completions", headers=headers, json=body)
    if not response.is_success or "x-switchgear-prefill-worker" not in response.headers:
        raise RunFailed(f"a request was not disaggregated: {response.status_code} {response.text}")


def _spans_of(collector: Collector, trace_id: str) -> list[ReceivedSpan]:
    """Returns when all have come. Raises RunFailed."""
    deadline = time.monotonic() + SPAN_SECONDS
    while True:
        spans = collector.trace(trace_id)
        missing = FOLLOWED - {span.name for span in spans}
        if not missing and any(span.name.startswith("chat ") for span in spans):
            return spans
        if time.monotonic() > deadline:
            raise RunFailed(f"trace {trace_id} lacks {', '.join(sorted(missing)) or 'its root'}")
        time.sleep(_POLL_SECONDS)


def _seconds(spans: list[ReceivedSpan]) -> float:
    ended = max(span.ended_at_ns for span in spans)
    return (ended - min(span.began_at_ns for span in spans)) / 1e9


def _kept(span: ReceivedSpan) -> TraceSpan:
    return TraceSpan(
        service=span.service,
        instance=span.instance,
        span_id=span.span_id,
        parent_id=span.parent_id,
        name=span.name,
        began_at_ns=span.began_at_ns,
        ended_at_ns=span.ended_at_ns,
        attributes=span.attributes,
        is_error=span.is_error,
    )
