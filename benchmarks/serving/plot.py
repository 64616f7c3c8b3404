"""Draws kept results. Runs in .venv-dynamo, which has matplotlib:
`python -m benchmarks.serving.plot RESULT.json PICTURE.png`.
"""

import sys
from collections.abc import Callable
from math import isnan
from pathlib import Path

import matplotlib

from benchmarks.serving.report import median, ttft_seconds
from benchmarks.serving.results import Benchmark, Run

matplotlib.use("Agg")
from matplotlib import pyplot

_COLOURS = ("#1f6f8b", "#c9a227", "#8b5a1f", "#7a3b69")
_SPREAD = 0.6
"""Of a scenario's points, where the next one's begin at 1."""
_PANELS: tuple[tuple[str, Callable[[Run], float]], ...] = (
    ("tokens/s", lambda run: run.tokens_per_second),
    ("TTFT p50, ms", lambda run: 1e3 * ttft_seconds(run, 50)),
    ("latency p99, ms", lambda run: 1e3 * run.latency_p99_seconds),
    ("CPU seconds per 1,000 tokens", Run.cpu_seconds_per_1000_tokens),
)


def draw(benchmark: Benchmark, picture: Path) -> None:
    """One panel for each quantity: dashes are medians, points are the runs."""
    names = [scenario.name for scenario in benchmark.scenarios]
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 9), layout="constrained")
    for axis, (title, value) in zip(axes.flat, _PANELS, strict=True):
        for number, system in enumerate(benchmark.systems):
            offset = _SPREAD * ((number + 0.5) / len(benchmark.systems) - 0.5)
            for place, name in enumerate(names):
                runs = benchmark.runs_of(system, name)
                values = [value(run) for run in runs]
                middle = median(runs, value)
                if isnan(middle):
                    continue
                colour = _COLOURS[number % len(_COLOURS)]
                label = system if place == 0 else None
                axis.plot([place + offset] * len(values), values, ".", color=colour, alpha=0.5)
                axis.plot(place + offset, middle, "_", color=colour, ms=16, mew=4, label=label)
                axis.annotate(
                    f"{middle:,.3g}" if middle < 1_000 else f"{middle:,.0f}",
                    (place + offset, middle),
                    textcoords="offset points",
                    xytext=(0, 6),
                    ha="center",
                    fontsize=8,
                )
        axis.set_title(title)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend()
    machine = benchmark.machine
    figure.suptitle(
        f"{machine.cpu}, {machine.cores} cores; {benchmark.step_ms:g} ms steps; medians of "
        f"{benchmark.rounds} alternating runs (points: the runs); logarithmic scales"
    )
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Benchmark.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
