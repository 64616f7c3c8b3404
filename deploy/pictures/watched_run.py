"""A run for the dashboards: load on a deployment to which things happen, and a Prometheus."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.local import live_config
from deploy.local.topology import Component
from deploy.pictures import dashboards, prometheus
from deploy.pictures.load import put_load
from deploy.pictures.observed import READY_SECONDS, Observed, Report, RunFailed, observed
from deploy.pictures.prometheus import Points, Prometheus
from deploy.pictures.recording import Dashboard, Event, Labels, Watched

CLIENTS = 12
TRACE_SAMPLE_RATIO = "0.2"
DOWN_SECONDS = 10.0
"""How long what was killed stays dead, until it is started again as a supervisor would."""
STALLED_SECONDS = 2.0
"""So that a prefill worker has prompts in hand when it dies."""

_FEW = ("--max-running-requests", "4", "--max-waiting-requests", "2")
"""So that a burst is refused now and then."""


def watch(seconds: float, seed: int, report: Report) -> Watched:
    """Starts simulated engines and all else, puts load on it for so long, and asks Prometheus what
    the dashboards ask. Raises RunFailed, ClusterError and PrometheusError."""
    flags: dict[Component, tuple[str, ...]] = {
        "frontend": ("--trace-sample-ratio", TRACE_SAMPLE_RATIO),
        "decode_worker": _FEW,
    }
    text = prometheus.CONFIGURATION.read_text()
    with observed("sim", decode=2, flags=flags, report=report) as it:
        configuration = prometheus.local_configuration(text, it.specs)
        with prometheus.running(configuration, it.folder, it.take_port()) as store:
            happenings = _Happenings(it, report)
            began_at = time.time()
            asyncio.run(_under_load(happenings, it, seconds, seed))
            ended_at = time.time()
            if down := store.targets_down():
                raise RunFailed(f"Prometheus can't scrape {', '.join(down)}")
            step_seconds = prometheus.scrape_interval_seconds(configuration)
            return Watched(
                deployment=it.in_words(),
                began_at_seconds=began_at,
                ended_at_seconds=ended_at,
                step_seconds=step_seconds,
                events=tuple(happenings.events),
                dashboards=_filled(store, began_at, ended_at, step_seconds),
            )


async def _under_load(happenings: _Happenings, it: Observed, seconds: float, seed: int) -> None:
    ends_at = time.monotonic() + seconds
    load = asyncio.create_task(
        put_load(it.url, it.deployment.model_name, clients=CLIENTS, seed=seed)
    )
    try:
        await happenings.all(seconds)
        await asyncio.wait([load], timeout=max(0.0, ends_at - time.monotonic()))
        if load.done():  # It ends by itself only when it has failed.
            load.result()
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)


class _Happenings:
    """What is done to a deployment, and when it was."""

    def __init__(self, it: Observed, report: Report) -> None:
        self._cluster, self._report = it.cluster, report
        self.events: list[Event] = []

    async def all(self, seconds: float) -> None:
        """One after the other, spread over the time."""
        began_at = time.monotonic()

        async def at(part: float) -> None:
            await asyncio.sleep(max(0.0, began_at + part * seconds - time.monotonic()))

        await at(0.1)
        with self._noted("a live setting that routers can't use"):
            await self._set("stall_weight", '"much"')
            await at(0.17)
            await self._set("stall_weight", None)
        await at(0.25)
        await self._kill("decode_worker-0")
        await at(0.42)
        with self._noted("prefill_worker-0 stalled, then killed"):
            self._cluster.kill("prefill_worker-0", signal.SIGSTOP)
            await asyncio.sleep(STALLED_SECONDS)
            await self._kill_and_restart("prefill_worker-0")
        await at(0.6)
        await self._kill("kv_indexer-0")
        await at(0.76)
        await self._kill("decode_worker-0", "decode_worker-1")

    async def _set(self, setting: str, value: str | None) -> None:
        etcd_url = self._cluster.process("etcd-0").spec.address
        key = live_config.full_key("router", setting, "")
        parsed = None if value is None else live_config.parsed(value)
        await asyncio.to_thread(live_config.write, etcd_url, key, parsed)

    async def _kill(self, *names: str) -> None:
        with self._noted(f"{' and '.join(names)} killed"):
            await self._kill_and_restart(*names)

    async def _kill_and_restart(self, *names: str) -> None:
        for name in names:
            self._cluster.kill(name)
        await asyncio.sleep(DOWN_SECONDS)
        for name in names:
            await asyncio.to_thread(self._cluster.restart, name, READY_SECONDS)

    @contextmanager
    def _noted(self, text: str) -> Iterator[None]:
        self._report(text)
        began_at = time.time()
        yield
        self.events.append(
            Event(began_at_seconds=began_at, ended_at_seconds=time.time(), text=text)
        )


def _filled(
    store: Prometheus, begin: float, end: float, step_seconds: int
) -> tuple[Dashboard, ...]:
    def ask(expression: str) -> list[tuple[Labels, Points]]:
        return store.series(expression, begin=begin, end=end, step_seconds=step_seconds)

    # Grafana's own rule: four scrapes.
    rate_interval = f"{4 * step_seconds}s"
    return tuple(dashboards.filled(board, ask, rate_interval) for board in dashboards.read())
