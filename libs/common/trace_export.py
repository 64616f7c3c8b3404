"""Spans on their way to a collector: OTLP over gRPC, in batches, from a thread of their own.

The queue is bounded, and what finds it full is dropped and counted: a collector that is slow or
away costs spans, never a request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from libs.common.tracing import SPANS, Kind, Span, Value

MAX_UNSENT_SPANS = 8192
BATCH_SPANS = 128
"""Encoding this many holds the interpreter's lock for about as long as the event loop's thread has
to wait for it anyway."""
BATCH_SECONDS = 1.0
"""How long spans wait for others, while there is less than a batch."""
EXPORT_SECONDS = 5.0
"""Retries included; then a batch is dropped."""
CLOSE_SECONDS = 2.0

_KINDS = {
    Kind.INTERNAL: SpanKind.INTERNAL,
    Kind.SERVER: SpanKind.SERVER,
    Kind.CLIENT: SpanKind.CLIENT,
}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_FINE = Status(StatusCode.UNSET)
_SCOPE = InstrumentationScope("switchgear")


class SpanExport:
    """A sink that exports. Used from one thread; the exporter has its own."""

    def __init__(
        self, exporter: SpanExporter, resource: Resource, max_unsent_spans: int = MAX_UNSENT_SPANS
    ) -> None:
        self._resource = resource
        self._max_unsent_spans = max_unsent_spans
        self._counting = _CountingExporter(exporter)
        # Its own queue has room for all that we let in, so that it never drops anything itself.
        self._processor = BatchSpanProcessor(
            self._counting,
            max_queue_size=max(max_unsent_spans, BATCH_SPANS),
            max_export_batch_size=BATCH_SPANS,
            schedule_delay_millis=BATCH_SECONDS * 1000,
        )
        self._taken_spans = 0
        for outcome in ("exported", "queue_full", "export_failed"):
            SPANS.labels(outcome)

    def take(
        self, span: Span, ended_at_ns: int, attributes: Mapping[str, Value], error: str
    ) -> None:
        if self._taken_spans - self._counting.settled_spans >= self._max_unsent_spans:
            SPANS.labels("queue_full").inc()
            return
        self._taken_spans += 1
        parent = None
        if span.parent_id:
            parent = SpanContext(
                span.trace_id, span.parent_id, span.is_parent_remote, trace_flags=_SAMPLED
            )
        status = _FINE
        if error:
            status = Status(StatusCode.ERROR, error)
            attributes = {**attributes, "error.type": error}
        # Not by way of the SDK's tracer: its spans cost ten times as much, for what nobody uses
        # here, and can't be named to others before they are made.
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=SpanContext(
                    span.trace_id, span.span_id, is_remote=False, trace_flags=_SAMPLED
                ),
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                kind=_KINDS[span.kind],
                status=status,
                start_time=span.began_at_ns,
                end_time=ended_at_ns,
                instrumentation_scope=_SCOPE,
            )
        )

    def flush(self) -> None:
        """Exports what there is; blocks until that is done or has failed."""
        self._processor.force_flush()

    def close(self) -> None:
        """Exports what there is, if that takes no longer than CLOSE_SECONDS."""
        # Once the exporter is shut down it gives up at once what it is still given.
        limit = threading.Timer(CLOSE_SECONDS, self._counting.shutdown)
        limit.start()
        try:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
        finally:
            limit.cancel()


class _CountingExporter(SpanExporter):
    """Says what became of the spans."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.settled_spans = 0
        """Exported or given up."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.settled_spans += len(spans)
            outcome = "exported" if result is SpanExportResult.SUCCESS else "export_failed"
            SPANS.labels(outcome).inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


@contextmanager
def to_collector(
    endpoint: str, *, component: str, namespace: str, name: str
) -> Iterator[SpanExport]:
    """Exports to an OTLP collector, as http://host:port, while the body runs."""
    resource = Resource.create(
        {
            "service.name": component,
            "service.namespace": f"switchgear.{namespace}",
            "service.instance.id": name or component,
        }
    )
    export = SpanExport(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS), resource)
    try:
        yield export
    finally:
        export.close()
