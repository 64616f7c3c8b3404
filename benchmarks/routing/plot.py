"""Draws kept results. Runs in .venv-dynamo, which has matplotlib:
`python -m benchmarks.routing.plot RESULT.json PICTURE.png`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from benchmarks.routing.results import Benchmark, Run

matplotlib.use("Agg")
from matplotlib import pyplot

_COLOURS = {
    ("switchgear", "kv"): "#1f6f8b",
    ("dynamo", "kv"): "#c9a227",
    ("switchgear", "least-load"): "#7a3b69",
    ("switchgear", "round-robin"): "#8b5a1f",
    ("dynamo", "round-robin"): "#c0a080",
}
_PANELS: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
    ("requests that met the goal, %", "linear", lambda run: 100 * run.met_goal / run.requests),
    ("prompt tokens reused, %", "linear", lambda run: 100 * run.reuse),
    ("TTFT p50, ms", "log", lambda run: 1e3 * run.ttft_p50_seconds),
    ("TTFT p90, ms", "log", lambda run: 1e3 * run.ttft_p90_seconds),
    ("TTFT p99, ms", "log", lambda run: 1e3 * run.ttft_p99_seconds),
    ("ITL p50, ms", "linear", lambda run: 1e3 * run.itl_p50_seconds),
)


def draw(benchmark: Benchmark, picture: Path) -> None:
    """One panel for each quantity, one bar for each system and policy."""
    runs = {(run.row.name, run.system, run.policy): run for run in benchmark.runs}
    rows = sorted({run.row.name for run in benchmark.runs})
    width = 0.8 / len(_COLOURS)
    figure, axes = pyplot.subplots(3, 2, figsize=(17, 13), layout="constrained")
    for axis, (title, scale, value) in zip(axes.flat, _PANELS, strict=True):
        for number, ((system, policy), colour) in enumerate(_COLOURS.items()):
            places = [place for place, row in enumerate(rows) if (row, system, policy) in runs]
            axis.bar(
                [place + (number - (len(_COLOURS) - 1) / 2) * width for place in places],
                [value(runs[rows[place], system, policy]) for place in places],
                width,
                color=colour,
                label=f"{system}, {policy}",
            )
        axis.set_title(title)
        axis.set_yscale(scale)
        axis.set_xticks(range(len(rows)), [row.replace(", ", "\n") for row in rows], fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"Routing, {benchmark.started_at}, commit {benchmark.commit}")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    draw(Benchmark.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
