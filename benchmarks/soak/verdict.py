"""Whether anything leaks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.soak.results import Figures, Outcome, Sample, Soak


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen), which one outlier in
    four does not move. 0 when there are no two points one beside the other."""
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    first, second = np.triu_indices(len(x), k=1)
    runs = x[second] - x[first]
    is_apart = runs != 0
    if not is_apart.any():
        return 0.0
    return float(np.median((y[second] - y[first])[is_apart] / runs[is_apart]))


def growth_bytes_per_request(samples: Sequence[Sample], service: str) -> float:
    """How resident memory grew over the last half of the requests."""
    if not samples:
        return 0.0
    middle = (samples[0].finished_requests + samples[-1].finished_requests) / 2
    half = [sample for sample in samples if sample.finished_requests >= middle]
    return slope(
        [sample.finished_requests for sample in half],
        [sample.services[service].resident_bytes for sample in half],
    )


def left_behind(idle: Sample, now: Sample) -> list[str]:
    """What is there and was not before, or belongs to requests though there are none."""
    return [
        f"{name} {what}"
        for name, before in idle.services.items()
        for what in _left_in(before, now.services[name])
    ]


def _left_in(before: Figures, now: Figures) -> Iterator[str]:
    yield from in_state(now)
    for what, was, is_now in (
        ("tasks", before.tasks, now.tasks),
        ("gRPC calls", before.calls, now.calls),
        ("open files", before.open_files, now.open_files),
    ):
        if is_now > was:
            yield f"has {is_now} {what}, {was} before"


def in_state(now: Figures) -> Iterator[str]:
    """What the process knows of requests."""
    for metric, value in now.state.items():
        if value:
            yield f"has {metric} {value:g}"


def unexpected(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{outcome.kind}: {count} times {what!r} and not {outcome.wanted!r}"
        for outcome in outcomes
        for what, count in outcome.counts.items()
        if what != outcome.wanted
    ]


def leaks(soak: Soak) -> list[str]:
    """Everything that is wrong; empty when all is well."""
    found = unexpected(soak.outcomes) + left_behind(soak.idle, soak.end)
    for name in soak.idle.services:
        growth = growth_bytes_per_request(soak.samples, name)
        if growth > soak.max_bytes_per_request:
            found.append(
                f"{name} grows by {growth:.0f} bytes a request, "
                f"more than {soak.max_bytes_per_request:g}"
            )
    return found
