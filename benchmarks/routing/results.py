"""What is kept of a benchmark, as JSON. All that the report says is computed from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, computed_field

from benchmarks.serving.results import Machine

TTFT_GOAL_SECONDS = 2.0
ITL_GOAL_SECONDS = 0.04


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Row(_Record):
    """One load."""

    workers: int
    speed_up: float
    """Arrivals come so many times faster than recorded."""
    system_prompt_tokens: int = 0
    """Put before every prompt."""
    prefill_workers: int = 0
    """Beside `workers`, which decode then."""
    trace: str = ""
    """Another one than the benchmark's, by name."""
    routers: int = 1
    """That get requests in turn."""
    is_spread: bool = False
    """Arrivals within the seconds that the trace's times are rounded to, not all at once."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        prefill = f"{self.prefill_workers} + " if self.prefill_workers else ""
        prompt = f", {self.system_prompt_tokens:,} shared" if self.system_prompt_tokens else ""
        trace = f"{self.trace}, " if self.trace else ""
        routers = f", {self.routers} routers" if self.routers > 1 else ""
        spread = ", spread" if self.is_spread else ""
        load = f"{prefill}{self.workers} workers, {self.speed_up:g}x"
        return f"{trace}{load}{prompt}{spread}{routers}"


class Served(_Record):
    """One request, as it was served."""

    prompt_tokens: int
    cached_tokens: int
    ttft_seconds: float
    itl_seconds: float | None
    """Mean over the request; None with a single output token."""

    @property
    def is_late(self) -> bool:
        return self.ttft_seconds > TTFT_GOAL_SECONDS

    @property
    def is_slow(self) -> bool:
        return self.itl_seconds is not None and self.itl_seconds > ITL_GOAL_SECONDS


class Run(_Record):
    """One system and policy under one load."""

    row: Row
    system: str
    policy: str
    requests: int
    refused: int = 0
    """These met no goal, and count nowhere else."""
    met_goal: int
    late: int
    """First token later than the goal."""
    slow: int
    """Mean gap between tokens above the goal."""
    reuse: float
    """Part of all prompt tokens that was cached where the request went."""
    ttft_p50_seconds: float
    ttft_p90_seconds: float
    ttft_p99_seconds: float
    itl_p50_seconds: float
    itl_p90_seconds: float | None = None
    """None in results of before it was kept."""
    itl_p99_seconds: float
    wall_seconds: float
    """That the replay itself took."""


class Decisions(_Record):
    """How fast decisions are."""

    workers: int
    holders: int
    """Of the prompt's first half."""
    policy: str
    decisions_per_second: float


class Benchmark(_Record):
    started_at: str
    commit: str
    machine: Machine
    versions: dict[str, str]
    trace: str
    """The file's name."""
    requests: int
    runs: list[Run]
    decisions: list[Decisions]


def summary(
    row: Row,
    system: str,
    policy: str,
    served: Sequence[Served],
    wall_seconds: float,
    refused: int = 0,
) -> Run:
    """The figures of one run, of at least one request that was served."""
    ttfts = sorted(one.ttft_seconds for one in served)
    itls = sorted(one.itl_seconds for one in served if one.itl_seconds is not None)
    prompt_tokens = sum(one.prompt_tokens for one in served)
    return Run(
        row=row,
        system=system,
        policy=policy,
        requests=len(served) + refused,
        refused=refused,
        met_goal=sum(not (one.is_late or one.is_slow) for one in served),
        late=sum(one.is_late for one in served),
        slow=sum(one.is_slow for one in served),
        reuse=sum(one.cached_tokens for one in served) / prompt_tokens,
        ttft_p50_seconds=percentile(ttfts, 50),
        ttft_p90_seconds=percentile(ttfts, 90),
        ttft_p99_seconds=percentile(ttfts, 99),
        itl_p50_seconds=percentile(itls, 50),
        itl_p90_seconds=percentile(itls, 90),
        itl_p99_seconds=percentile(itls, 99),
        wall_seconds=wall_seconds,
    )


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of ascending values that so many percent of all do not exceed; NaN of none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else float("nan")
