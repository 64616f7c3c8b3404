"""What is kept of a soak, as JSON. All that the report says is computed from it. Pure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figures(_Record):
    """One process at one moment."""

    resident_bytes: int
    open_files: int
    """File descriptors, sockets among them."""
    threads: int
    tasks: int = 0
    """Of the event loop; none in servers that are not ours."""
    calls: int = 0
    """gRPC calls in progress, the sessions of other services among them."""
    state: dict[str, float] = {}
    """What there is of requests, by metric: all 0 when there is no request."""


class Sample(_Record):
    """All processes at one moment."""

    at_seconds: float
    """Since the first request."""
    finished_requests: int
    services: dict[str, Figures]


class Outcome(_Record):
    kind: str
    wanted: str
    """What must come of a request of this kind."""
    counts: dict[str, int]
    """What came of them."""


class Soak(_Record):
    """One run."""

    started_at: str
    commit: str
    machine: str
    clients: int
    warm_up_requests: int
    requests: int
    """After the warm-up."""
    seconds: float
    max_bytes_per_request: float
    """Growth of a process beyond this is a leak."""
    outcomes: list[Outcome]
    """Of all requests, warm-up included."""
    idle: Sample
    """After the warm-up, when all was quiet."""
    samples: list[Sample]
    """Under load, after the warm-up."""
    end: Sample
    """After the last request, when all was quiet or the patience for that was over."""
