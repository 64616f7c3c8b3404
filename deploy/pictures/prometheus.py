"""A real Prometheus that scrapes the processes of a local deployment by the rules of
deploy/prometheus, and what it answers.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.local.process import ProcessSpec
from deploy.local.topology import HOST, REPOSITORY
from deploy.pictures.recording import Labels

CONFIGURATION = REPOSITORY / "deploy" / "prometheus" / "prometheus.yml"
UNPACKED = REPOSITORY / "build" / "prometheus" / "usr" / "bin" / "prometheus"
"""Where scripts/prometheus.sh puts it."""
JOB = "switchgear"

Points = tuple[tuple[float, float], ...]
"""Unix seconds and values."""

READY_SECONDS = 60.0
STOP_SECONDS = 20.0
ANSWER_SECONDS = 30.0
_POLL_SECONDS = 0.1


class PrometheusError(Exception):
    """There is none, or it did not start or answer. The text says which."""


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)

    def series(
        self, expression: str, *, begin: float, end: float, step_seconds: float
    ) -> list[tuple[Labels, Points]]:
        """A range query. Raises PrometheusError when the expression is wrong."""
        params: dict[str, str | float] = {
            "query": expression,
            "start": begin,
            "end": end,
            "step": step_seconds,
        }
        answer = self._client.get("/api/v1/query_range", params=params).json()
        if answer["status"] != "success":
            raise PrometheusError(f"{expression}: {answer['error']}")
        return [
            (
                series["metric"],
                tuple(
                    (float(at), number)
                    for at, value in series["values"]
                    if not isnan(number := float(value))
                ),
            )
            for series in answer["data"]["result"]
        ]

    def targets_down(self) -> list[str]:
        """Those whose last scrape failed or has not been."""
        targets = self._client.get("/api/v1/targets").json()["data"]["activeTargets"]
        return [target["labels"]["instance"] for target in targets if target["health"] != "up"]

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False


def local_configuration(text: str, services: Iterable[ProcessSpec]) -> dict[str, Any]:
    """The configuration of deploy/prometheus with the processes of this machine in the place of
    Docker's DNS: each target has the name that would have been looked up, so that relabelling is
    done as there, and its own name as `instance`."""
    configuration: dict[str, Any] = yaml.safe_load(text)
    [job] = [job for job in configuration["scrape_configs"] if job["job_name"] == JOB]
    [discovery] = job.pop("dns_sd_configs")
    names = set(discovery["names"])
    job["static_configs"] = [
        {
            "targets": [f"{HOST}:{spec.ports['metrics']}"],
            "labels": {"__meta_dns_name": name, "instance": spec.name},
        }
        for spec in services
        if (name := spec.name.rpartition("-")[0].replace("_", "-")) in names
    ]
    rules = [str(CONFIGURATION.parent / name) for name in configuration["rule_files"]]
    # Envoy is not part of the deployment, and etcd's metrics are on no dashboard.
    return {**configuration, "rule_files": rules, "scrape_configs": [job]}


def scrape_interval_seconds(configuration: dict[str, Any]) -> int:
    return int(configuration["global"]["scrape_interval"].removesuffix("s"))


@contextmanager
def running(configuration: dict[str, Any], folder: Path, port: int) -> Iterator[Prometheus]:
    """Starts one in an empty folder, and stops it at the end. Raises PrometheusError."""
    binary = shutil.which("prometheus") or (str(UNPACKED) if UNPACKED.is_file() else None)
    if binary is None:
        raise PrometheusError("Prometheus is not installed; scripts/prometheus.sh fetches it")
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    command = [binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address={HOST}:{port}", "--log.level=warn"]
    log_path = folder / "prometheus.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            prometheus = Prometheus(f"http://{HOST}:{port}")
            deadline = time.monotonic() + READY_SECONDS
            while not prometheus.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PrometheusError(f"Prometheus did not start: {log_path.read_text()}")
                time.sleep(_POLL_SECONDS)
            yield prometheus
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
