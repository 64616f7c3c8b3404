"""Makes docs/pictures anew from runs on this machine: `python -m deploy.pictures --help`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from deploy.local.cluster import ClusterError
from deploy.local.topology import REPOSITORY
from deploy.pictures import traced_run, watched_run
from deploy.pictures.observed import RunFailed
from deploy.pictures.prometheus import PrometheusError
from deploy.pictures.recording import Trace, Watched

DRAWING_PYTHON = REPOSITORY / ".venv-dynamo" / "bin" / "python"
"""The services' environment has nothing that draws; the one that is for comparing has."""
PICTURES = REPOSITORY / "docs" / "pictures"
_DRAW_SECONDS = 300.0

Folder = Annotated[Path, typer.Option(help="Folder for pictures.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def dashboards(
    seconds: Annotated[float, typer.Option(min=120, help="Of load.")] = 300,
    seed: int = 0,
    pictures: Folder = PICTURES,
) -> None:
    """Draw every dashboard from a run with simulated engines, load and failures.

    Exits with 1 when a query brought no data; the pictures are there even so.
    """
    _check_drawing()
    watched = watched_run.watch(seconds, seed, _say)
    _draw("watched", watched, pictures)
    empty = [query for board in watched.dashboards for query in board.without_data()]
    for query in empty:
        print(f"no data: {query}", file=sys.stderr)
    if empty:
        raise typer.Exit(1)


@app.command()
def trace(engine: Literal["vllm", "sim"] = "vllm", pictures: Folder = PICTURES) -> None:
    """Draw one disaggregated request from the spans that the collector got."""
    _check_drawing()
    _draw("trace", traced_run.trace(engine, _say), pictures)


def _say(text: str) -> None:
    print(text, flush=True)


def _check_drawing() -> None:
    if not DRAWING_PYTHON.is_file():
        raise RunFailed("no .venv-dynamo, which has matplotlib: make pictures makes it")


def _draw(kind: str, recording: Watched | Trace, pictures: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="switchgear-pictures-") as folder:
        kept = Path(folder) / "recording.json"
        kept.write_text(recording.model_dump_json())
        subprocess.run(
            [str(DRAWING_PYTHON), "-m", "deploy.pictures.draw", kind, str(kept), str(pictures)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            timeout=_DRAW_SECONDS,
            check=True,
        )


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except (ClusterError, PrometheusError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
