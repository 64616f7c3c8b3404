"""The tables, from the kept results. Pure."""

from __future__ import annotations

from math import nan

from benchmarks.routing.results import (
    ITL_GOAL_SECONDS,
    TTFT_GOAL_SECONDS,
    Benchmark,
    Run,
)

_EXPLANATION = f"""\
Each row replays the same recorded arrivals, prompts and output lengths on simulated workers with a
virtual clock. *Met* counts the requests whose first token came within {TTFT_GOAL_SECONDS:g} s, and
whose tokens came {ITL_GOAL_SECONDS * 1e3:g} ms apart or less on average; *late* and *slow* are
those that missed the one or the other. *Refused* are those that nobody took; they met nothing, and
count in no other column. *Reuse* is the part of all prompt tokens that was cached on
the worker that got the request.

Ours runs the router's decisions, the KV indexer's index and the simulator's scheduler, with the
timing of Dynamo's mocker, its 16,384 blocks of 16 tokens a worker and its steps of at most 8,192
tokens. The index learns of blocks 50 ms late, as in service. Theirs is Dynamo's own offline replay
with its defaults, where the router learns of blocks at once. That the two simulators are alike is
to be seen from the round-robin lines, where nothing depends on what a router knows. Policies never
see the length of an output, nor what is still to come. Dynamo's replay has no policy by load alone,
and one router; several of ours take requests in turn, and know nothing of each other. Workers tell
routers their loads as in service, with each step and 5 ms after a request has come, and that takes
2 ms. The trace's times are multiples of 3 s, so that ten requests or so arrive at one instant; in
the rows *spread* they arrive within those 3 s. In a disaggregated set-up, "2 + 6 workers" are 2
that compute prompts and 6 that decode; KV moves in no time in both systems.
*Conversations* are made up (`benchmarks/routing/synthetic.py`), *azure* is Azure's LLM inference
trace, which tells of lengths alone.
"""


def markdown(benchmark: Benchmark) -> str:
    """The whole report."""
    machine = benchmark.machine
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    parts = [
        f"# Routing, {benchmark.started_at}\n",
        f"Commit {benchmark.commit}; {benchmark.trace}, {benchmark.requests:,} requests; "
        f"{machine.cpu}, {machine.cores} cores; {versions}.\n",
    ]
    if benchmark.runs:
        minutes = sum(run.wall_seconds for run in benchmark.runs) / 60
        took = f"All replays together took {minutes:.0f} minutes of this machine.\n"
        parts += [_EXPLANATION, took, _runs(benchmark.runs)]
    if benchmark.decisions:
        parts.append(
            "Decisions of one router process on one core, overlaps already known. *Holders* have "
            "the first half of the prompt.\n"
        )
        parts.append(_decisions(benchmark))
    return "\n".join(parts)


def _runs(runs: list[Run]) -> str:
    lines = [
        "| load | requests | system | policy | met | refused | late | slow | reuse "
        "| TTFT p50 / p90 / p99 ms | ITL p50 / p90 / p99 ms |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for run in sorted(runs, key=lambda run: (run.row.name, run.policy, run.system)):
        ttft = (run.ttft_p50_seconds, run.ttft_p90_seconds, run.ttft_p99_seconds)
        itl = (run.itl_p50_seconds, run.itl_p90_seconds or nan, run.itl_p99_seconds)
        lines.append(
            f"| {run.row.name} | {run.requests:,} | {run.system} | {run.policy} "
            f"| {run.met_goal:,} | {run.refused:,} | {run.late:,} | {run.slow:,} "
            f"| {run.reuse:.1%} | {_ms(ttft, 0)} | {_ms(itl, 1)} |"
        )
    return "\n".join(lines) + "\n"


def _ms(seconds: tuple[float, ...], digits: int) -> str:
    return " / ".join(f"{one * 1e3:,.{digits}f}" for one in seconds)


def _decisions(benchmark: Benchmark) -> str:
    lines = [
        "| workers | holders | policy | decisions/s |",
        "| --: | --: | --- | --: |",
    ]
    lines += [
        f"| {one.workers:,} | {one.holders:,} | {one.policy} | {one.decisions_per_second:,.0f} |"
        for one in benchmark.decisions
    ]
    return "\n".join(lines) + "\n"
