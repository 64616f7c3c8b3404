"""Policies beside each other and beside Dynamo's: `python -m benchmarks.routing --help`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.routing import report, results, speed, synthetic, trace
from benchmarks.routing.replay import Replay, Terms
from benchmarks.routing.results import Benchmark, Row, Run, Served
from benchmarks.serving import environment
from benchmarks.serving.systems import DYNAMO_PYTHON
from deploy.local.topology import REPOSITORY
from services.router.core.decision import Policy

_RESULTS = REPOSITORY / "benchmarks" / "results"
_DYNAMO_TIMEOUT_SECONDS = 600.0
_BLOCK_SIZE_TOKENS = 16

AZURE = "azure"
_AZURE_FILE = "AzureLLMInferenceTrace_conv.csv"
CONVERSATIONS = "conversations"
_CONVERSATIONS = 2_000
_CONVERSATIONS_SEED = 1
_SPREAD_SEED = 1

ROWS = {
    "8x2": Row(workers=8, speed_up=2),
    "16x4": Row(workers=16, speed_up=4),
    "8x1": Row(workers=8, speed_up=1),
    "8x3": Row(workers=8, speed_up=3),
    "32x6": Row(workers=32, speed_up=6),
    "8x2-3-routers": Row(workers=8, speed_up=2, routers=3),
    "8x2-spread": Row(workers=8, speed_up=2, is_spread=True),
    "8x2-spread-3-routers": Row(workers=8, speed_up=2, is_spread=True, routers=3),
    "16x4-shared": Row(workers=16, speed_up=4, system_prompt_tokens=8_192),
    "2+6x2": Row(workers=6, speed_up=2, prefill_workers=2),
    "4+4x2": Row(workers=4, speed_up=2, prefill_workers=4),
    "conversations-8x2": Row(workers=8, speed_up=2, trace=CONVERSATIONS),
    "azure-4x8": Row(workers=4, speed_up=8, trace=AZURE),
}
"""8x3 is more than the workers can serve, 4+4x2 all that they can."""

POLICIES = {"kv": "kv_router", "round-robin": "round_robin", "least-load": None}
"""Ours, and what Dynamo calls its like."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    trace_file: Annotated[
        Path, typer.Option("--trace", help="In Mooncake's format.", exists=True, dir_okay=False)
    ],
    row: Annotated[
        list[str] | None, typer.Option(help=f"Only these of {', '.join(ROWS)}; repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Only these; repeatable. All three if none.")
    ] = None,
    azure_trace: Annotated[
        Path | None,
        typer.Option(
            help=f"In Azure's format, for the rows of it; {_AZURE_FILE} beside the other if none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    dynamo: Annotated[bool, typer.Option(help="Dynamo, too.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Replays at a time.")] = 1,
    folder: Annotated[Path, typer.Option("--results", help="Folder for results.")] = _RESULTS,
) -> None:
    """Replay, keep the results as JSON, and write the report and the plot beside them."""
    unknown = set(row or ()) - ROWS.keys()
    if unknown:
        raise typer.BadParameter(f"no such row: {', '.join(sorted(unknown))}", param_hint="--row")
    if dynamo and not DYNAMO_PYTHON.is_file():
        raise typer.BadParameter("no .venv-dynamo here; use --no-dynamo", param_hint="--dynamo")
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit = environment.commit()  # Before the hour in which somebody may make another.
    if azure_trace is None and trace_file.with_name(_AZURE_FILE).is_file():
        azure_trace = trace_file.with_name(_AZURE_FILE)
    rows = _rows(row, has_azure=azure_trace is not None)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="switchgear-routing-") as scratch:
        tasks = []
        for one in rows:
            source = azure_trace if azure_trace and one.trace == AZURE else trace_file
            variant = _variant(source, one, requests, Path(scratch))
            tasks += [(variant, one, name) for name in policy or POLICIES]
        with ProcessPoolExecutor(max_workers=jobs) as pool:
            waiting = [pool.submit(_ours, *task) for task in tasks]
            if dynamo:
                waiting += [pool.submit(_theirs, *task) for task in tasks if _has_like(task)]
            for done in as_completed(waiting):
                runs.append(done.result())
                print(_line(runs[-1]), flush=True)
    _keep(
        folder,
        Benchmark(
            started_at=started_at,
            commit=commit,
            machine=environment.machine(),
            versions=environment.versions_without_wrk(),
            trace=trace_file.name,
            requests=max((run.requests for run in runs if not run.row.trace), default=0),
            runs=runs,
            decisions=list(_decisions()),
        ),
    )


def _rows(names: list[str] | None, *, has_azure: bool) -> list[Row]:
    rows = [ROWS[name] for name in names or ROWS]
    if has_azure:
        return rows
    if names and any(row.trace == AZURE for row in rows):
        raise typer.BadParameter("needed for such rows", param_hint="--azure-trace")
    print(f"no rows of {AZURE}: {_AZURE_FILE} is not beside the trace")
    return [row for row in rows if row.trace != AZURE]


@app.command("speed")
def show_speed() -> None:
    """Only measure how many decisions a second there are."""
    for one in _decisions():
        print(
            f"{one.workers:5} workers, {one.holders:4} holders, {one.policy:<12} "
            f"{one.decisions_per_second:10,.0f} decisions/s",
            flush=True,
        )


@app.command("report")
def write_report(kept: Annotated[Path, typer.Argument(help="Results as JSON.")]) -> None:
    """Write the report and the plot of kept results anew."""
    benchmark = Benchmark.model_validate_json(kept.read_text())
    page = report.markdown(benchmark)
    if benchmark.runs:
        _draw(kept)
        page += f"\n![The same as bars]({kept.with_suffix('.png').name})\n"
    kept.with_suffix(".md").write_text(page)
    print(page)


def _draw(kept: Path) -> None:
    if not DYNAMO_PYTHON.is_file():
        print("no plot: it takes .venv-dynamo, which make bench makes")
        return
    subprocess.run(
        [
            *(str(DYNAMO_PYTHON), "-m", "benchmarks.routing.plot"),
            *(str(kept), str(kept.with_suffix(".png"))),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=_DYNAMO_TIMEOUT_SECONDS,
        check=True,
    )


def _keep(folder: Path, benchmark: Benchmark) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"routing-{benchmark.started_at.replace(':', '')}.json"
    kept.write_text(benchmark.model_dump_json(indent=1) + "\n")
    write_report(kept)


def _variant(trace_file: Path, row: Row, requests: int | None, scratch: Path) -> Path:
    """The trace as this row wants it: what both systems read."""
    if row.trace == CONVERSATIONS:
        arrivals = synthetic.conversations(_CONVERSATIONS, seed=_CONVERSATIONS_SEED)[:requests]
    elif row.trace == AZURE:
        arrivals = trace.read_azure(trace_file, requests=requests)
    else:
        arrivals = trace.read(trace_file, requests=requests)
    if row.system_prompt_tokens:
        blocks = row.system_prompt_tokens // trace.TRACE_BLOCK_TOKENS
        arrivals = trace.with_system_prompt(arrivals, blocks)
    if row.is_spread:
        arrivals = trace.spread(arrivals, trace.MOONCAKE_TICK_SECONDS, seed=_SPREAD_SEED)
    written = scratch / f"{row.trace}{row.system_prompt_tokens}{row.is_spread}.jsonl"
    trace.write(written, arrivals)
    return written


def _has_like(task: tuple[Path, Row, str]) -> bool:
    """Whether Dynamo's replay can do it: it has one router, and no policy by load alone."""
    _, row, policy = task
    return row.routers == 1 and POLICIES.get(policy) is not None


def _ours(trace_file: Path, row: Row, policy: str) -> Run:
    started = time.monotonic()

    def progress(arrived: int) -> None:
        seconds = time.monotonic() - started
        print(f"  {row.name}, {policy}: {arrived:,} arrived after {seconds:.0f} s", flush=True)

    outcomes = Replay(
        trace.read(trace_file, speed_up=row.speed_up),
        Policy(prefill_policy=policy, decode_policy=policy),
        Terms(
            workers=row.workers,
            prefill_workers=row.prefill_workers,
            block_size_tokens=_BLOCK_SIZE_TOKENS,
            routers=row.routers,
        ),
    ).run(progress)
    served = [
        Served(
            prompt_tokens=outcome.arrival.prompt_tokens,
            cached_tokens=outcome.cached_tokens,
            ttft_seconds=outcome.ttft_seconds,
            itl_seconds=outcome.itl_seconds,
        )
        for outcome in outcomes
        if not outcome.is_refused
    ]
    refused = len(outcomes) - len(served)
    seconds = time.monotonic() - started
    return results.summary(row, "switchgear", policy, served, seconds, refused)


def _theirs(trace_file: Path, row: Row, policy: str) -> Run:
    wanted = {
        "trace": str(trace_file),
        "workers": row.workers,
        "prefill_workers": row.prefill_workers,
        "router_mode": POLICIES[policy],
        "speed_up": row.speed_up,
        "block_size_tokens": _BLOCK_SIZE_TOKENS,
        "trace_block_tokens": trace.TRACE_BLOCK_TOKENS,
        "ttft_goal_ms": results.TTFT_GOAL_SECONDS * 1_000,
        "itl_goal_ms": results.ITL_GOAL_SECONDS * 1_000,
    }
    started = time.monotonic()
    finished = subprocess.run(
        [str(DYNAMO_PYTHON), "-m", "benchmarks.routing.dynamo_replay", json.dumps(wanted)],
        cwd=REPOSITORY,
        # Otherwise it writes a line for each decision.
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DYN_LOG": "error"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=_DYNAMO_TIMEOUT_SECONDS,
        check=True,
    )
    told = json.loads(finished.stdout.splitlines()[-1])
    served = [Served.model_validate(one) for one in told["of"]]
    seconds = time.monotonic() - started
    run = results.summary(row, "dynamo", policy, served, seconds, told["refused"])
    # Counted by the same rule as ours: its own count must come out.
    assert run.met_goal == told["met_goal"], (run.met_goal, told["met_goal"])
    return run


def _line(run: Run) -> str:
    ttft = (run.ttft_p50_seconds, run.ttft_p90_seconds, run.ttft_p99_seconds)
    return (
        f"{run.row.name:<28} {run.system:<10} {run.policy:<12} {run.met_goal:6,} met  "
        f"reuse {run.reuse:5.1%}  TTFT {' / '.join(f'{one * 1e3:,.0f}' for one in ttft)} ms"
    )


def _decisions() -> Iterator[results.Decisions]:
    for workers, holders in ((8, 4), (100, 10), (1_000, 0), (1_000, 10), (1_000, 1_000)):
        yield speed.measure(workers, holders, "kv")
    yield speed.measure(1_000, 0, "power-of-two")
    yield speed.measure(1_000, 0, "round-robin")


def main() -> None:
    try:
        app()
    except trace.TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
