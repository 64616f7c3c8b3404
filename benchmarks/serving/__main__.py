"""Switchgear and others side by side: `python -m benchmarks.serving --help`."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.serving import environment, measure, report, scenarios, systems
from benchmarks.serving.load import LoadError
from benchmarks.serving.probe import ProbeError
from benchmarks.serving.results import Benchmark, Ceiling, Check, Run, ScenarioRecord
from benchmarks.serving.scenarios import Scenario
from benchmarks.serving.systems import System
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.topology import REPOSITORY

_RESULTS = REPOSITORY / "benchmarks" / "results"
_DIFFERENCES = Path(__file__).with_name("differences.md")
_WARM_UP_SECONDS = 2.0
_IDLE_SECONDS = 5.0
_TOOL_TIMEOUT_SECONDS = 120.0

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    quick: Annotated[bool, typer.Option(help="Few scenarios, one run of 4 s each.")] = False,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only those with this in their name; repeatable.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of {', '.join(systems.START)}; repeatable. "
            f"Without: {', '.join(systems.COMPARED)}."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each scenario and system.")] = 3,
    seconds: Annotated[int, typer.Option(min=2, help="Length of a run.")] = 8,
    step_ms: Annotated[float, typer.Option(min=0.1, help="Length of a decode step.")] = 6.0,
    results: Annotated[Path, typer.Option(help="Folder for results.")] = _RESULTS,
) -> None:
    """Measure, keep the results as JSON, and write the report and the plot beside them."""
    if quick:
        rounds, seconds = 1, 4
    chosen = [
        one
        for one in (scenarios.QUICK if quick else scenarios.FULL)
        if not scenario or any(part in one.name for part in scenario)
    ]
    names = system or list(systems.COMPARED)
    if unknown := [name for name in names if name not in systems.START]:
        raise typer.BadParameter(f"no system {unknown[0]!r}, only: {', '.join(systems.START)}")
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    versions, commit = environment.versions(), environment.commit()
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="switchgear-bench-") as folder, ExitStack() as running:
        model = systems.make_model_folder(Path(folder) / "model", print)
        started = []
        for name in names:
            print(f"starting {name}")
            cluster = running.enter_context(LocalCluster(Path(folder) / name.replace(" ", "-")))
            started.append(systems.START[name](cluster, model, step_ms=step_ms))
        checks, idle_cpu_cores, runs = asyncio.run(_measure(started, chosen, rounds, seconds))
    benchmark = Benchmark(
        started_at=started_at,
        commit=commit,
        machine=environment.machine(),
        versions=versions,
        step_ms=step_ms,
        rounds=rounds,
        seconds_per_run=seconds,
        scenarios=[ScenarioRecord(**dataclasses.asdict(one)) for one in chosen],
        checks=checks,
        idle_cpu_cores=idle_cpu_cores,
        ceilings=_ceilings(chosen),
        runs=runs,
    )
    results.mkdir(parents=True, exist_ok=True)
    name = f"serving-{'quick-' if quick else ''}{started_at.replace(':', '')}.json"
    kept = results / name
    kept.write_text(benchmark.model_dump_json(indent=1) + "\n")
    write_report(kept)


@app.command("report")
def write_report(kept: Annotated[Path, typer.Argument(help="Results as JSON.")]) -> None:
    """Write the report and the plot of kept results anew."""
    benchmark = Benchmark.model_validate_json(kept.read_text())
    picture, page = kept.with_suffix(".png"), kept.with_suffix(".md")
    # The services' environment has nothing that draws; the one that is only for comparing has.
    subprocess.run(
        [str(systems.DYNAMO_PYTHON), "-m", "benchmarks.serving.plot", str(kept), str(picture)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=_TOOL_TIMEOUT_SECONDS,
        check=True,
    )
    differences = _DIFFERENCES.read_text()
    page.write_text(report.markdown(benchmark, picture_name=picture.name, differences=differences))
    print(page.read_text())
    print(f"kept: {kept}, {page.name}, {picture.name}")


async def _measure(
    running: Sequence[System], chosen: Sequence[Scenario], rounds: int, seconds: float
) -> tuple[dict[str, dict[str, Check]], dict[str, float], list[Run]]:
    idle_cpu_cores = {
        system.name: await measure.idle_cpu_cores(system, seconds=_IDLE_SECONDS)
        for system in running
    }
    checks: dict[str, dict[str, Check]] = {system.name: {} for system in running}
    runs: list[Run] = []
    for scenario in chosen:
        for system in running:
            if scenario.is_streamed:
                checks[system.name][scenario.name] = await measure.check(system, scenario)
            await measure.run(system, scenario, seconds=_WARM_UP_SECONDS, round_number=0)
            await measure.settle(system)
        for number in range(1, rounds + 1):
            # Who goes first changes, too.
            for system in running if number % 2 else running[::-1]:
                one = await measure.run(
                    system, scenario, seconds=seconds * scenario.run_length, round_number=number
                )
                await measure.settle(system)
                runs.append(one)
                print(_line(one))
    return checks, idle_cpu_cores, runs


def _line(run: Run) -> str:
    line = f"{run.scenario:<26} {run.system:<17} {run.requests_per_second:9,.1f} req/s"
    line += f" {run.tokens_per_second:9,.0f} tok/s"
    if run.is_streamed:
        line += f"  TTFT {1e3 * report.ttft_seconds(run, 50):7.1f} ms"
    line += f"  latency {1e3 * run.latency_p50_seconds:7.1f} ms"
    line += f"  CPU {run.cpu_seconds_per_1000_tokens():.3f} s/1k tok"
    return line + (f"  {run.failures} FAILED" if run.failures else "")


def _ceilings(chosen: Sequence[Scenario]) -> list[Ceiling]:
    """Measured in a process of its own, with everything else stopped."""
    counts = sorted({max(1, scenario.clients // systems.WORKERS) for scenario in chosen})
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.ceiling", *map(str, counts)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TOOL_TIMEOUT_SECONDS,
        check=True,
    )
    return [
        Ceiling(sequences=int(count), tokens_per_second=tokens_per_second)
        for count, tokens_per_second in json.loads(finished.stdout).items()
    ]


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    try:
        app()
    except (ClusterError, LoadError, ProbeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
