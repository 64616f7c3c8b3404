"""Sends many requests and looks for what they leave behind: `python -m benchmarks.soak --help`.

Exits with 1 when something leaks or a request did not end as it must.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.serving.systems import DYNAMO_PYTHON
from benchmarks.soak import report
from benchmarks.soak.deployment import CLIENTS, make_deployment, processes
from benchmarks.soak.results import Sample
from benchmarks.soak.run import NotQuiet, soak
from benchmarks.soak.verdict import leaks
from deploy.local import default_model
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.topology import REPOSITORY

_RESULTS = REPOSITORY / "benchmarks" / "results"
_READY_SECONDS = 120.0
_DRAW_SECONDS = 120.0
_SAY_SECONDS = 10.0


def main(
    requests: Annotated[int, typer.Option(min=1_000, help="After the warm-up.")] = 200_000,
    warm_up: Annotated[int, typer.Option(min=1, help="Requests before anything counts.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = CLIENTS,
    max_bytes_per_request: Annotated[
        float, typer.Option(help="A process that grows faster leaks.")
    ] = 32.0,
    seed: int = 0,
    results: Annotated[Path, typer.Option(help="Folder for results.")] = _RESULTS,
) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    take_port = FreePorts().take
    deployment = make_deployment(default_model.tokenizer_folder(print), take_port())
    with tempfile.TemporaryDirectory(prefix="switchgear-soak-") as folder:
        run_dir = Path(folder)
        with LocalCluster(run_dir) as cluster:
            cluster.start(processes(deployment, run_dir, take_port))
            cluster.wait_ready(_READY_SECONDS)
            outcome = asyncio.run(
                soak(
                    cluster,
                    deployment,
                    requests=requests,
                    warm_up_requests=warm_up,
                    clients=clients,
                    max_bytes_per_request=max_bytes_per_request,
                    seed=seed,
                    report=_Progress(requests),
                )
            )
    results.mkdir(parents=True, exist_ok=True)
    kept = results / f"soak-{outcome.started_at.replace(':', '')}.json"
    kept.write_text(outcome.model_dump_json() + "\n")
    page = report.markdown(outcome)
    kept.with_suffix(".md").write_text(page)
    print(page)
    _draw(kept)
    sys.exit(1 if leaks(outcome) else 0)


class _Progress:
    """A line now and then."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._said_at = time.monotonic()

    def __call__(self, sample: Sample) -> None:
        if time.monotonic() - self._said_at >= _SAY_SECONDS:
            self._said_at = time.monotonic()
            resident = sum(figures.resident_bytes for figures in sample.services.values())
            print(f"{sample.finished_requests:,} requests, {resident / 1e6:,.0f} MB", flush=True)


def _draw(kept: Path) -> None:
    """The services' environment has nothing that draws; the one that is for comparing has."""
    if not DYNAMO_PYTHON.is_file():
        print("no plot: it takes .venv-dynamo, which make bench makes")
        return
    picture = kept.with_suffix(".png")
    subprocess.run(
        [str(DYNAMO_PYTHON), "-m", "benchmarks.soak.plot", str(kept), str(picture)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=_DRAW_SECONDS,
        check=True,
    )
    print(f"kept: {kept}, {picture.name}")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ClusterError, NotQuiet) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
