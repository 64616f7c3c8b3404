"""The tables, from the kept results. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.soak.results import Figures, Soak
from benchmarks.soak.verdict import growth_bytes_per_request, leaks


def markdown(soak: Soak) -> str:
    return "\n".join([_heading(soak), _verdict(soak), _services(soak), _outcomes(soak)])


def _heading(soak: Soak) -> str:
    rate = soak.requests / soak.seconds
    return f"""\
# {soak.requests:,} requests of all kinds

{soak.started_at}, commit {soak.commit}. {soak.machine}. {soak.clients} clients, \
{soak.seconds:,.0f} s, {rate:,.0f} requests/s, after {soak.warm_up_requests:,} requests as warm-up.
"""


def _verdict(soak: Soak) -> str:
    found = leaks(soak)
    if not found:
        return (
            "**Nothing leaks**: no request, task, call or file descriptor is left, and no process "
            f"grows by more than {soak.max_bytes_per_request:g} bytes a request.\n"
        )
    return "**Leaks:**\n\n" + "\n".join(f"- {line}" for line in found) + "\n"


def _services(soak: Soak) -> str:
    rows = []
    for name, idle in soak.idle.services.items():
        most = max(
            (sample.services[name] for sample in soak.samples),
            key=lambda figures: figures.resident_bytes,
            default=idle,
        )
        end = soak.end.services[name]
        growth = growth_bytes_per_request(soak.samples, name)
        rows.append(
            [
                name,
                f"{idle.resident_bytes / 1e6:,.1f}",
                f"{most.resident_bytes / 1e6:,.1f}",
                f"{end.resident_bytes / 1e6:,.1f}",
                f"{growth:+.1f}",
                *(f"{getattr(idle, what)} → {getattr(end, what)}" for what in _COUNTS),
                _state(end),
            ]
        )
    header = ["RSS after warm-up, MB", "most", "at the end", "bytes a request", *_COUNTS.values()]
    return (
        "Growth is the median of the slopes between all pairs of samples in the last half of the "
        "requests; services collect garbage every few seconds here. "
        "Counts are when nobody asks: after the warm-up → at the end.\n\n"
        + _table(["", *header, "left of requests"], rows)
    )


_COUNTS = {
    "open_files": "open files",
    "threads": "threads",
    "tasks": "tasks",
    "calls": "gRPC calls",
}


def _state(figures: Figures) -> str:
    return f"{sum(figures.state.values()):g}" if figures.state else ""


def _outcomes(soak: Soak) -> str:
    rows = [
        [
            outcome.kind,
            f"{sum(outcome.counts.values()):,}",
            ", ".join(f"{what}: {count:,}" for what, count in outcome.counts.items()),
        ]
        for outcome in soak.outcomes
    ]
    return _table(["", "requests", "outcome"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns without a name hold names; all others hold numbers."""
    lines = [header, ["--:" if name else "---" for name in header]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *rows]) + "\n"
