"""Soaks that nobody ran."""

from __future__ import annotations

from typing import Any

from benchmarks.soak.results import Figures, Outcome, Sample, Soak


def figures(**different: Any) -> Figures:
    facts: dict[str, Any] = {
        "resident_bytes": 100_000_000,
        "open_files": 20,
        "threads": 4,
        "tasks": 10,
        "calls": 2,
        "state": {"running": 0.0},
    }
    return Figures.model_validate(facts | different)


def sample(finished_requests: int = 0, **different: Any) -> Sample:
    """Of one process, `router-0`."""
    return Sample(
        at_seconds=finished_requests / 100,
        finished_requests=finished_requests,
        services={"router-0": figures(**different)},
    )


def soak(**different: Any) -> Soak:
    """1,000 requests, of which nothing is left."""
    facts: dict[str, Any] = {
        "started_at": "2030-01-01T00:00:00Z",
        "commit": "abcdef0",
        "machine": "some processor",
        "clients": 8,
        "warm_up_requests": 100,
        "requests": 1_000,
        "seconds": 10.0,
        "max_bytes_per_request": 32.0,
        "outcomes": [Outcome(kind="chat", wanted="200", counts={"200": 1_100})],
        "idle": sample(),
        "samples": [sample(number) for number in range(100, 1_100, 50)],
        "end": sample(1_100),
    }
    return Soak.model_validate(facts | different)
