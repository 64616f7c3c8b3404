"""Traces of sampled requests, for OpenTelemetry.

Whoever works on a request keeps a `Span` of it, or None: when tracing is off, or the request is not
sampled, that None is all there is. Whether a request is sampled is decided once, by the caller's
traceparent or where the request enters, and travels with it (W3C Trace Context).

A span is a note of who asked and since when, until it ends; only then is it given to the exporter,
which has a thread of its own. So a request that is sampled costs a few objects for each leg, and
nothing for each token.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

from prometheus_client import Counter

from libs.common.config import ServiceSettings

Value = str | int | float | bool | Sequence[str]

SPANS = Counter(
    "switchgear_trace_spans",
    "Spans of sampled requests: exported, or dropped because the queue was full or the export"
    " failed.",
    ["outcome"],
)

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 0x01


class Kind(Enum):
    """On which side of a call between processes a span is. Values are OpenTelemetry's."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2


class Sink(Protocol):
    """Where spans go when they have ended."""

    def take(
        self,
        span: Span,
        ended_at_ns: int,
        attributes: Mapping[str, Value],
        error: str,
    ) -> None:
        """Must not block. An empty error means that all went well."""


_sink: Sink | None = None


class Span:
    """Part of a sampled request's way, from a moment on."""

    __slots__ = (
        "_sink",
        "began_at_ns",
        "is_parent_remote",
        "kind",
        "name",
        "parent_id",
        "span_id",
        "trace_id",
    )

    def __init__(
        self,
        sink: Sink,
        name: str,
        kind: Kind,
        trace_id: int,
        parent_id: int,
        began_at_ns: int,
        *,
        is_parent_remote: bool,
    ) -> None:
        self._sink = sink
        self.name = name
        self.kind = kind
        self.trace_id = trace_id
        self.span_id = random.getrandbits(64) or 1
        self.parent_id = parent_id
        """0 for the first span of a trace."""
        self.began_at_ns = began_at_ns
        """Since 1970."""
        self.is_parent_remote = is_parent_remote

    @property
    def traceparent(self) -> str:
        """For those who are asked for a part of the work."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    def child(
        self, name: str, kind: Kind = Kind.INTERNAL, *, began_at_ns: int | None = None
    ) -> Span:
        """A part of this one, from now on unless told otherwise."""
        began_at_ns = time.time_ns() if began_at_ns is None else began_at_ns
        return Span(
            self._sink,
            name,
            kind,
            self.trace_id,
            self.span_id,
            began_at_ns,
            is_parent_remote=False,
        )

    def end(
        self,
        attributes: Mapping[str, Value] | None = None,
        *,
        error: str = "",
        ended_at_ns: int | None = None,
    ) -> None:
        """Gives the span away. Called once. An error is a reason, such as WORKER_LOST."""
        ended_at_ns = time.time_ns() if ended_at_ns is None else ended_at_ns
        self._sink.take(self, max(ended_at_ns, self.began_at_ns), attributes or {}, error)


def is_on() -> bool:
    """Whether any span would be taken."""
    return _sink is not None


def new_trace_id() -> int:
    """At random, and not 0."""
    return random.getrandbits(128) or 1


def follow(traceparent: str, name: str, *, began_at_ns: int | None = None) -> Span | None:
    """The receiver's part of a request that is traced already; None when it is not, or not
    sampled."""
    if _sink is None or not traceparent:
        return None
    parsed = _parse(traceparent)
    if parsed is None:
        return None
    trace_id, parent_id, is_sampled = parsed
    if not is_sampled:
        return None
    began_at_ns = time.time_ns() if began_at_ns is None else began_at_ns
    return Span(_sink, name, Kind.SERVER, trace_id, parent_id, began_at_ns, is_parent_remote=True)


def begin(
    traceparent: str, name: str, *, ratio: float, trace_id: int, began_at_ns: int
) -> Span | None:
    """As `follow`, but without a traceparent a new trace begins, for this ratio of trace ids."""
    if _sink is None:
        return None
    if traceparent and _parse(traceparent) is not None:
        return follow(traceparent, name, began_at_ns=began_at_ns)
    # The part of the id that OpenTelemetry's TraceIdRatioBased sampler looks at, too.
    if trace_id & (1 << 64) - 1 >= ratio * (1 << 64):
        return None
    return Span(_sink, name, Kind.SERVER, trace_id, 0, began_at_ns, is_parent_remote=False)


def begin_own(name: str) -> Span | None:
    """A new trace, of what a service does without being asked to. For what is rare: each is
    sampled."""
    if _sink is None:
        return None
    return Span(
        _sink, name, Kind.INTERNAL, new_trace_id(), 0, time.time_ns(), is_parent_remote=False
    )


def _parse(traceparent: str) -> tuple[int, int, bool] | None:
    """Trace id, parent id, and whether it is sampled; None for what is no traceparent."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    trace_id, parent_id, flags = (int(part, 16) for part in match.groups())
    if not (trace_id and parent_id):
        return None
    return trace_id, parent_id, bool(flags & _SAMPLED)


def is_valid(traceparent: str) -> bool:
    """Whether others can make something of it."""
    return _parse(traceparent) is not None


def log_ids(request_id: str, traceparent: str) -> dict[str, str]:
    """The fields by which log lines on a request are found, its trace among them if it has one."""
    ids = {"request_id": request_id}
    if is_valid(traceparent):
        ids["trace_id"] = traceparent[3:35]
    return ids


def wall_ns(monotonic_seconds: float) -> int:
    """A moment of `time.monotonic`, or of the event loop, in nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - monotonic_seconds) * 1e9)


@contextmanager
def exporting(component: str, settings: ServiceSettings) -> Iterator[None]:
    """Spans that end while the body runs are exported, if the settings say where to."""
    if not settings.otlp_endpoint:
        yield
        return
    # Only now, since others need not load it.
    from libs.common import trace_export

    with (
        trace_export.to_collector(
            settings.otlp_endpoint,
            component=component,
            namespace=settings.namespace,
            name=settings.name,
        ) as sink,
        giving_to(sink),
    ):
        yield


@contextmanager
def giving_to(sink: Sink) -> Iterator[None]:
    """Spans that begin while the body runs go there."""
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before
