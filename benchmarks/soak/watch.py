"""Looks at every process of a deployment: what the system says of it, and what it says itself."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import psutil

from benchmarks.soak.http_client import HttpConnection
from benchmarks.soak.results import Figures, Sample
from deploy.local.cluster import LocalCluster
from deploy.local.process import RunningProcess
from deploy.local.topology import HOST

_STATE = (
    "switchgear_frontend_in_flight_requests",
    "switchgear_router_busy_sessions",
    "switchgear_worker_running_requests",
    "switchgear_worker_waiting_requests",
    "switchgear_worker_queued_prefill_tokens",
    "switchgear_worker_active_kv_blocks",
)
"""Metrics that are 0 when there is no request. KV that waits to be pulled is active, too."""

_SCRAPE_SECONDS = 10.0


class Watch:
    """All processes of a cluster, at any time."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._processes = cluster.processes()
        self._known = [psutil.Process(process.pid) for process in self._processes]
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()

    async def sample(self, finished_requests: int) -> Sample:
        """Raises OSError or TimeoutError when a process does not answer."""
        async with asyncio.timeout(_SCRAPE_SECONDS):
            scraped = await asyncio.gather(*map(_metrics, self._processes))
        return Sample(
            at_seconds=self._loop.time() - self._began_at,
            finished_requests=finished_requests,
            services={
                process.name: _figures(known, metrics)
                for process, known, metrics in zip(
                    self._processes, self._known, scraped, strict=True
                )
            },
        )


def _figures(process: psutil.Process, metrics: dict[str, float]) -> Figures:
    with process.oneshot():
        return Figures(
            resident_bytes=process.memory_info().rss,
            open_files=process.num_fds(),
            threads=process.num_threads(),
            tasks=int(metrics.get("switchgear_asyncio_tasks", 0)),
            calls=int(metrics.get("switchgear_grpc_calls", 0)),
            state={name: metrics[name] for name in _STATE if name in metrics},
        )


async def _metrics(process: RunningProcess) -> dict[str, float]:
    """The sum of each metric's samples; nothing for servers that are not ours."""
    port = process.spec.ports.get("metrics")
    if port is None:
        return {}
    connection = HttpConnection(HOST, port)
    try:
        answer = await connection.get("/metrics")
    finally:
        connection.abort()
    return parse_metrics(answer.body.decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus's text format; samples of one name are added up."""
    totals: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line and not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            totals[sample.partition("{")[0]] += float(value)
    return dict(totals)
