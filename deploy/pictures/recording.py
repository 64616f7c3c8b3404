"""What is kept of a run for drawing: written in one environment, read in the one that draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

Labels = dict[str, str]


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True)


class Series(_Kept):
    """One line of a panel."""

    legend: str
    points: tuple[tuple[float, float], ...]
    """Unix seconds and value; instants without a value are left out."""


class Query(_Kept):
    """One query of a panel, and what Prometheus answered."""

    expression: str
    """As the dashboard has it, variables included."""
    legend: str
    """With {{label}} for the labels of each series."""
    series: tuple[Series, ...] = ()


class Panel(_Kept):
    """A place in a dashboard's grid, which is 24 units wide."""

    type: str
    """`row`, `text`, `timeseries`."""
    title: str
    description: str
    text: str
    """Of a text panel, in Markdown."""
    unit: str
    """As Grafana names units: s, bytes, reqps, short, ..."""
    x: int
    y: int
    width: int
    height: int
    queries: tuple[Query, ...]

    @property
    def series(self) -> tuple[Series, ...]:
        return tuple(series for query in self.queries for series in query.series)


class Dashboard(_Kept):
    name: str
    """Of its file."""
    title: str
    description: str
    panels: tuple[Panel, ...]

    def without_data(self) -> list[str]:
        """Which queries brought nothing, by panel and legend."""
        return [
            f"{self.title}: {panel.title}: {query.legend}"
            for panel in self.panels
            for query in panel.queries
            if not any(series.points for series in query.series)
        ]


class TraceSpan(_Kept):
    """A span as the collector got it."""

    service: str
    instance: str
    span_id: str
    parent_id: str
    name: str
    began_at_ns: int
    ended_at_ns: int
    attributes: dict[str, str | int | float | bool | list[str]]
    is_error: bool


class Event(_Kept):
    """Something that was done to the deployment."""

    began_at_seconds: float
    """Unix time."""
    ended_at_seconds: float
    """When it was as before; the same if it did not last."""
    text: str


class Watched(_Kept):
    """A run that dashboards watched."""

    deployment: str
    """In words."""
    began_at_seconds: float
    ended_at_seconds: float
    step_seconds: float
    """Between points of a series."""
    events: tuple[Event, ...]
    dashboards: tuple[Dashboard, ...]


class Trace(_Kept):
    """One request, as the collector was told of it."""

    deployment: str
    trace_id: str
    spans: tuple[TraceSpan, ...]

    def in_tree(self) -> Iterator[tuple[int, TraceSpan]]:
        """Depth and span: parents before children, and siblings in order of beginning. A span whose
        parent is not there begins a tree."""
        known = {span.span_id for span in self.spans}
        children: dict[str, list[TraceSpan]] = defaultdict(list)
        for span in sorted(self.spans, key=lambda each: each.began_at_ns):
            children[span.parent_id if span.parent_id in known else ""].append(span)

        def below(parent_id: str, depth: int) -> Iterator[tuple[int, TraceSpan]]:
            for span in children[parent_id]:
                yield depth, span
                yield from below(span.span_id, depth + 1)

        yield from below("", 0)
