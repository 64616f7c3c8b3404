"""Draws what was recorded. Runs in .venv-dynamo, which has matplotlib:
`python -m deploy.pictures.draw watched|trace RECORDING.json FOLDER`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
from PIL import Image

from deploy.pictures.recording import Trace, Watched

matplotlib.use("Agg")
from matplotlib.figure import Figure

from deploy.pictures import board, waterfall

_DOTS_PER_INCH = 110
_COLOURS = 128
"""Of a palette: a third of the bytes, and nobody sees the difference in lines and letters."""


def draw_watched(watched: Watched, folder: Path) -> None:
    """A picture of each dashboard."""
    for dashboard in watched.dashboards:
        _save(board.figure(dashboard, watched), folder / f"{dashboard.name}.png")


def draw_trace(trace: Trace, folder: Path) -> None:
    _save(waterfall.figure(trace), folder / "trace.png")


def _save(figure: Figure, picture: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DOTS_PER_INCH, facecolor=figure.get_facecolor())
    drawn.seek(0)
    image = Image.open(drawn).convert("RGB")
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1024:,.0f} KiB")


def main(kind: str, recording: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "watched":
        draw_watched(Watched.model_validate_json(recording), folder)
    else:
        draw_trace(Trace.model_validate_json(recording), folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).read_text(), Path(sys.argv[3]))
