"""The tables, from the kept results. Pure."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.serving.results import Benchmark, Run, ScenarioRecord

OURS = "switchgear"


def markdown(benchmark: Benchmark, *, picture_name: str, differences: str) -> str:
    """The whole report. The picture is a file beside it; `differences` goes last, as it is."""
    parts = [_heading(benchmark)]
    parts.append(f"![All systems under the same load]({picture_name})\n")
    parts.append(_comparison(benchmark))
    parts.append(_cpu_by_role(benchmark))
    parts.append(_ceiling(benchmark))
    parts.append(_failures(benchmark))
    parts.append(differences)
    return "\n".join(parts)


def median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """Of the runs' values; NaN without runs."""
    return statistics.median(value(run) for run in runs) if runs else float("nan")


def ttft_seconds(run: Run, percentile: int) -> float:
    """NaN for answers that are not streamed."""
    return _percentile([probe.ttft_seconds for probe in run.probes], percentile)


def possible_tokens_per_second(scenario: ScenarioRecord, step_ms: float) -> float:
    """What the steps allow when all clients are served at once and nothing else takes time."""
    return scenario.clients * 1_000 / step_ms


def _percentile(values: Sequence[float], percentile: int) -> float:
    """The smallest value that so many percent of all do not exceed."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, -(-len(values) * percentile // 100) - 1)]


_COLUMNS: tuple[tuple[str, Callable[[Run], float], str], ...] = (
    ("req/s", lambda run: run.requests_per_second, "{:,.1f}"),
    ("tok/s", lambda run: run.tokens_per_second, "{:,.0f}"),
    ("TTFT p50 ms", lambda run: 1e3 * ttft_seconds(run, 50), "{:,.1f}"),
    ("TTFT p99 ms", lambda run: 1e3 * ttft_seconds(run, 99), "{:,.1f}"),
    ("latency p50 ms", lambda run: 1e3 * run.latency_p50_seconds, "{:,.1f}"),
    ("latency p99 ms", lambda run: 1e3 * run.latency_p99_seconds, "{:,.1f}"),
    ("CPU s/1k tok", lambda run: run.cpu_seconds_per_1000_tokens(), "{:.3f}"),
    ("RSS MB", lambda run: sum(run.resident_bytes.values()) / 1e6, "{:,.0f}"),
)


def _heading(benchmark: Benchmark) -> str:
    machine = benchmark.machine
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    idle = ", ".join(f"{name} {cores:.3f}" for name, cores in benchmark.idle_cpu_cores.items())
    others = [run.other_cpu_seconds / run.window_seconds for run in benchmark.runs]
    other = f"{statistics.median(others):.2f} cores (median; at most {max(others):.2f})"
    return f"""\
# {" and ".join(benchmark.systems)} under the same load

{benchmark.started_at}, commit {benchmark.commit}. {machine.cpu}, {machine.cores} cores, \
{machine.memory_bytes / 1e9:.0f} GB, {machine.system}. {versions}.
Medians of {benchmark.rounds} alternating runs of {benchmark.seconds_per_run:g} s. All systems \
stay up; idle they take ({idle}) cores. All else on the machine took {other}.
"""


def _comparison(benchmark: Benchmark) -> str:
    rows = []
    for scenario in benchmark.scenarios:
        measured = {name: benchmark.runs_of(name, scenario.name) for name in benchmark.systems}
        for number, (name, runs) in enumerate(measured.items()):
            cells = [_cell(pattern, median(runs, value)) for _, value, pattern in _COLUMNS]
            rows.append(["" if number else scenario.name, name, *cells])
        ours = measured.pop(OURS, [])
        for name, theirs in measured.items() if ours else ():
            ratios = [
                _cell("**{:.2f}**", _ratio(median(ours, value), median(theirs, value)))
                for _, value, _ in _COLUMNS
            ]
            rows.append(["", f"{OURS} / {name}", *ratios])
    return table(["", "", *(name for name, _, _ in _COLUMNS)], rows)


def _cpu_by_role(benchmark: Benchmark) -> str:
    text = "## CPU seconds for 1,000 streamed tokens, by process\n"
    for name in benchmark.systems:
        all_runs = [run for run in benchmark.runs if run.system == name and run.is_streamed]
        roles = sorted({role for run in all_runs for role in run.cpu_seconds})
        rows = []
        for scenario in benchmark.scenarios:
            runs = benchmark.runs_of(name, scenario.name)
            if not runs or not scenario.is_streamed:
                continue
            cells = [
                _cell("{:.3f}", median(runs, lambda run, role=role: _role_cpu(run, role)))  # type: ignore[misc]
                for role in roles
            ]
            cores = median(runs, lambda run: sum(run.cpu_seconds.values()) / run.window_seconds)
            events = median(runs, _events_per_token)
            generator = median(runs, lambda run: run.load_generator_cpu_cores)
            rows.append(
                [scenario.name, *cells, f"{cores:.2f}", f"{events:.2f}", f"{generator:.2f}"]
            )
        text += f"\n{name}:\n\n"
        text += table(["", *roles, "cores in use", "events per token", "cores of wrk"], rows)
    return text


def _role_cpu(run: Run, role: str) -> float:
    return run.cpu_seconds_per_1000_tokens(role)


def _events_per_token(run: Run) -> float:
    tokens = len(run.probes) * run.output_tokens
    return sum(probe.text_events for probe in run.probes) / tokens if tokens else float("nan")


def _ceiling(benchmark: Benchmark) -> str:
    by_sequences = {ceiling.sequences: ceiling for ceiling in benchmark.ceilings}
    rows = []
    for scenario in benchmark.scenarios:
        ceiling = by_sequences.get(max(1, scenario.clients // 4))
        runs = benchmark.runs_of(OURS, scenario.name)
        if ceiling is None or not runs or not scenario.is_streamed or scenario.prompt_bytes:
            continue
        tokens = median(runs, lambda run: run.tokens_per_second)
        workers = min(scenario.clients, 4)
        alone = ceiling.tokens_per_second
        possible = possible_tokens_per_second(scenario, benchmark.step_ms)
        cpu = median(runs, lambda run: run.cpu_seconds_per_1000_tokens("decode_worker"))
        rows.append(
            [
                scenario.name,
                f"{possible:,.0f}",
                f"{tokens:,.0f}",
                f"{100 * tokens / possible:.0f} %",
                f"{tokens / workers:,.0f}",
                f"{alone:,.0f}",
                f"{1_000 / alone:.3f}",
                f"{cpu:.3f}",
            ]
        )
    steps = [
        f"{system} {check.step_ms:.2f} ms"
        for system, checks in benchmark.checks.items()
        for scenario_name, check in list(checks.items())[:1]
    ]
    return (
        "## The simulated engine is not the bottleneck\n\n"
        f"Step of one client alone, measured: {', '.join(steps)}. The engine alone, in a process "
        "of its own with steps that take no time and a quarter of the clients as sequences, per "
        "second of CPU time:\n\n"
        + table(
            [
                "",
                "steps allow tok/s",
                "streamed tok/s",
                "of what steps allow",
                "streamed by a worker",
                "engine alone tok/s",
                "engine alone CPU s/1k tok",
                "whole worker CPU s/1k tok",
            ],
            rows,
        )
    )


def _failures(benchmark: Benchmark) -> str:
    rows = [
        [run.scenario, run.system, *map(str, _failure_counts(run))]
        for run in benchmark.runs
        if run.failures
    ]
    if not rows:
        return "## Failed requests\n\nNone, in any run of any system.\n"
    header = ["", "", "round", "status 400 or more", "socket errors", "timeouts", "probes"]
    return f"## Failed requests\n\n{table(header, rows)}"


def _failure_counts(run: Run) -> tuple[int, ...]:
    return run.round, run.refused_answers, run.socket_errors, run.timeouts, run.failed_probes


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def _cell(pattern: str, value: float) -> str:
    return "" if value != value else pattern.format(value)  # NaN alone differs from itself.


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns without a name hold names; all others hold numbers."""
    names = list(header)
    lines = [names, ["--:" if name else "---" for name in names]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *rows]) + "\n"
