"""Draws kept results. Runs in .venv-dynamo, which has matplotlib:
`python -m benchmarks.soak.plot RESULT.json PICTURE.png`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from benchmarks.soak.results import Figures, Soak

matplotlib.use("Agg")
from matplotlib import pyplot

_PANELS: tuple[tuple[str, Callable[[Figures], float]], ...] = (
    ("resident memory, MB", lambda figures: figures.resident_bytes / 1e6),
    ("open files", lambda figures: figures.open_files),
    ("asyncio tasks", lambda figures: figures.tasks),
    ("state of requests (sum of metrics)", lambda figures: sum(figures.state.values())),
)


def draw(soak: Soak, picture: Path) -> None:
    """One panel for each quantity, one line for each process; the last point is after the load."""
    samples = [soak.idle, *soak.samples, soak.end]
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 9), layout="constrained")
    for axis, (title, value) in zip(axes.flat, _PANELS, strict=True):
        for name in soak.idle.services:
            axis.plot(
                [sample.finished_requests for sample in samples],
                [value(sample.services[name]) for sample in samples],
                label=name,
                lw=1,
            )
        axis.set_title(title)
        axis.set_xlabel("requests")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, ncols=2)
    figure.suptitle(f"{soak.requests:,} requests of all kinds, {soak.clients} clients")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Soak.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
