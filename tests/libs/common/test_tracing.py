"""Spans: who is sampled, how they nest, and what becomes of them when nobody takes them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.span import format_trace_id
from prometheus_client.registry import REGISTRY

from deploy.pictures.collector import collecting
from libs.common import tracing
from libs.common.trace_export import BATCH_SPANS, SpanExport, to_collector
from libs.common.tracing import Kind, Span
from tests.fixtures.eventually import until
from tests.fixtures.spans import KeptSpans

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-2] + "00"


def begin(traceparent: str, ratio: float, trace_id: int = 7) -> Span | None:
    return tracing.begin(traceparent, "chat", ratio=ratio, trace_id=trace_id, began_at_ns=1)


def test_nothing_is_traced_while_tracing_is_off() -> None:
    assert not tracing.is_on()
    assert begin("", 1.0) is None
    assert tracing.follow(SAMPLED, "route") is None


def test_a_callers_sampled_flag_decides_whatever_the_ratio() -> None:
    with tracing.giving_to(KeptSpans()):
        span = begin(SAMPLED, 0.0)
        assert span is not None
        assert (f"{span.trace_id:032x}", f"{span.parent_id:016x}") == tuple(SAMPLED.split("-")[1:3])
        assert begin(UNSAMPLED, 1.0) is None
        assert tracing.follow(UNSAMPLED, "route") is None


def test_without_a_caller_the_ratio_decides_by_trace_id_alone() -> None:
    with tracing.giving_to(KeptSpans()):
        assert begin("", 1.0, trace_id=(1 << 128) - 1) is not None
        assert begin("", 0.0, trace_id=1 << 64) is None
        assert begin("", 0.5, trace_id=(1 << 63) - 1) is not None
        assert begin("", 0.5, trace_id=1 << 63) is None
        root = begin("", 1.0)
        assert root is not None
        assert (root.trace_id, root.parent_id) == (7, 0)


@pytest.mark.parametrize(
    "nonsense",
    [
        "x",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff" + SAMPLED[2:],
        SAMPLED.upper(),
        SAMPLED + "\n",
    ],
)
def test_nonsense_is_as_no_traceparent(nonsense: str) -> None:
    with tracing.giving_to(KeptSpans()):
        assert not tracing.is_valid(nonsense)
        assert tracing.follow(nonsense, "route") is None
        span = begin(nonsense, 1.0)
        assert span is not None
        assert span.trace_id == 7


@given(
    st.text(st.characters(codec="ascii"))
    | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)
)
def test_traceparents_are_read_as_opentelemetry_reads_them(text: str) -> None:
    context = TraceContextTextMapPropagator().extract({"traceparent": text})
    theirs = otel.get_current_span(context).get_span_context()
    with tracing.giving_to(KeptSpans()):
        ours = tracing.follow(text, "route")
    if ours is not None:
        assert (ours.trace_id, ours.parent_id) == (theirs.trace_id, theirs.span_id)
        assert theirs.trace_flags.sampled
    elif theirs.is_valid and text.startswith("00-"):
        assert not theirs.trace_flags.sampled


def test_a_child_names_its_parent_and_others_are_given_the_child() -> None:
    kept = KeptSpans()
    with tracing.giving_to(kept):
        span = begin(SAMPLED, 0.0)
        assert span is not None
        child = span.child("attempt", Kind.CLIENT)
        remote = tracing.follow(child.traceparent, "route")
        assert remote is not None
        assert (remote.trace_id, remote.parent_id) == (span.trace_id, child.span_id)
        remote.end(error="WORKER_LOST")
        child.end({"a": 1})
        span.end()
    assert [ended.name for ended, *_ in kept.ended] == ["route", "attempt", "chat"]
    assert kept.ended[0][3] == "WORKER_LOST"
    assert kept.ended[1][2] == {"a": 1}


def test_a_span_never_ends_before_it_begins() -> None:
    kept = KeptSpans()
    with tracing.giving_to(kept):
        span = begin(SAMPLED, 0.0)
        assert span is not None
        span.child("late", began_at_ns=100).end(ended_at_ns=50)
    assert kept.ended[0][1] == 100


def test_log_lines_name_the_request_and_the_trace_that_it_has() -> None:
    assert tracing.log_ids("chatcmpl-1", "") == {"request_id": "chatcmpl-1"}
    assert tracing.log_ids("chatcmpl-1", UNSAMPLED) == {
        "request_id": "chatcmpl-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }


def test_monotonic_moments_become_wall_clock_moments() -> None:
    before = time.time_ns()
    assert abs(tracing.wall_ns(time.monotonic()) - before) < 1e9
    assert before - tracing.wall_ns(time.monotonic() - 5) > 4e9


def test_the_sdk_is_not_loaded_while_tracing_is_off() -> None:
    code = "import sys, libs.common.tasks; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_collector_gets_what_ended_with_its_resource() -> None:
    with (
        collecting() as collector,
        to_collector(
            collector.endpoint, component="router", namespace="default", name="router-0"
        ) as sink,
        tracing.giving_to(sink),
    ):
        span = begin(SAMPLED, 0.0)
        assert span is not None
        span.end({"answer": 42, "reasons": ("stop",)}, error="OVERLOADED", ended_at_ns=5)
        await asyncio.to_thread(sink.flush)
        [received] = collector.trace(format_trace_id(span.trace_id))
    assert (received.service, received.instance) == ("router", "router-0")
    assert received.parent_id == "b7ad6b7169203331"
    assert (received.began_at_ns, received.ended_at_ns) == (1, 5)
    assert received.attributes == {"answer": 42, "reasons": ["stop"], "error.type": "OVERLOADED"}
    assert received.is_error


def test_what_is_still_waiting_goes_out_when_exporting_ends() -> None:
    with collecting() as collector:
        with (
            to_collector(collector.endpoint, component="c", namespace="n", name="") as sink,
            tracing.giving_to(sink),
        ):
            span = begin(SAMPLED, 0.0)
            assert span is not None
            span.end()
        assert [received.name for received in collector.spans] == ["chat"]


class Stuck(SpanExporter):
    """Exports nothing until it is let."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.let = threading.Event()
        self.exported = 0
        self._result = result

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.let.wait(20)
        self.exported += len(spans)
        return self._result

    def shutdown(self) -> None:
        self.let.set()


def dropped(outcome: str) -> float:
    return REGISTRY.get_sample_value("switchgear_trace_spans_total", {"outcome": outcome}) or 0.0


def end_spans(export: SpanExport, count: int) -> None:
    with tracing.giving_to(export):
        for _ in range(count):
            span = begin("", 1.0)
            assert span is not None
            span.end()


async def test_spans_beyond_the_bound_are_dropped_and_counted() -> None:
    exporter = Stuck()
    export = SpanExport(exporter, Resource({}), max_unsent_spans=2 * BATCH_SPANS)
    before = dropped("queue_full")
    # Those of the batch that is on its way count, too.
    end_spans(export, 2 * BATCH_SPANS + 3)
    assert dropped("queue_full") - before == 3
    exporter.let.set()
    await until(lambda: exporter.exported == 2 * BATCH_SPANS)
    end_spans(export, 1)
    assert dropped("queue_full") - before == 3
    export.close()
    assert exporter.exported == 2 * BATCH_SPANS + 1


def test_spans_whose_export_failed_are_counted() -> None:
    exporter = Stuck(SpanExportResult.FAILURE)
    exporter.let.set()
    export = SpanExport(exporter, Resource({}))
    before = dropped("export_failed")
    end_spans(export, 5)
    export.close()
    assert dropped("export_failed") - before == 5


def test_closing_does_not_wait_for_a_collector_that_is_stuck() -> None:
    exporter = Stuck()
    export = SpanExport(exporter, Resource({}))
    end_spans(export, BATCH_SPANS)
    export.close()  # Returns because the exporter is shut down in the end.
    assert exporter.let.is_set()
