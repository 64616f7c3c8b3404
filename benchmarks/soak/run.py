"""One soak of a running deployment: warm-up, quiet, load, quiet."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable

from benchmarks.serving import environment
from benchmarks.soak import verdict
from benchmarks.soak.kinds import KINDS
from benchmarks.soak.load import Load, loading
from benchmarks.soak.results import Outcome, Sample, Soak
from benchmarks.soak.watch import Watch
from deploy.local.cluster import LocalCluster
from deploy.local.topology import Deployment
from libs.common.tasks import background

QUIET_SECONDS = 60.0
"""How long what is left of requests may take to go. KV that nobody pulls is kept for 30 s."""

_LOOK_SECONDS = 1.0
_KEPT_SAMPLES = 300


class NotQuiet(Exception):
    """Requests are left after the warm-up."""


async def soak(
    cluster: LocalCluster,
    deployment: Deployment,
    *,
    requests: int,
    warm_up_requests: int,
    clients: int,
    max_bytes_per_request: float,
    seed: int = 0,
    report: Callable[[Sample], None] = lambda sample: None,
) -> Soak:
    """`report` is told each sample under load. Raises NotQuiet."""
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit, machine = environment.commit(), environment.machine()
    watch = Watch(cluster)
    samples: list[Sample] = []
    async with loading(cluster, deployment, clients=clients, seed=seed) as load:

        async def look_again_and_again() -> None:
            while True:
                samples.append(await watch.sample(load.finished_requests))
                report(samples[-1])
                await asyncio.sleep(_LOOK_SECONDS)

        await load.send(warm_up_requests)
        idle = await _quiet_after_warm_up(watch, load)
        began_at = time.monotonic()
        async with background(look_again_and_again()):
            await load.send(requests)
        seconds = time.monotonic() - began_at
        end = await _quiet(watch, load, idle)
    return Soak(
        started_at=started_at,
        commit=commit,
        machine=f"{machine.cpu}, {machine.cores} cores, {machine.system}, "
        f"Python {platform.python_version()}",
        clients=clients,
        warm_up_requests=warm_up_requests,
        requests=requests,
        seconds=seconds,
        max_bytes_per_request=max_bytes_per_request,
        outcomes=[
            Outcome(
                kind=kind.name,
                wanted=kind.outcome,
                counts={
                    what: count
                    for (name, what), count in sorted(load.outcomes.items())
                    if name == kind.name
                },
            )
            for kind in KINDS
        ],
        idle=idle,
        samples=samples[:: -(-len(samples) // _KEPT_SAMPLES) or 1],
        end=end,
    )


async def _quiet_after_warm_up(watch: Watch, load: Load) -> Sample:
    """Once there are no requests and nothing has become less between two looks."""
    deadline = asyncio.get_running_loop().time() + QUIET_SECONDS
    before = await watch.sample(load.finished_requests)
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = await watch.sample(load.finished_requests)
        in_state = [
            f"{name} {what}"
            for name, figures in now.services.items()
            for what in verdict.in_state(figures)
        ]
        if not in_state and not verdict.left_behind(now, before):
            return now
        if asyncio.get_running_loop().time() > deadline:
            raise NotQuiet("; ".join(in_state) or "tasks, calls or files still come and go")
        before = now


async def _quiet(watch: Watch, load: Load, idle: Sample) -> Sample:
    """As soon as nothing is left behind, or the last look when that does not come."""
    deadline = asyncio.get_running_loop().time() + QUIET_SECONDS
    while True:
        now = await watch.sample(load.finished_requests)
        if not verdict.left_behind(idle, now) or asyncio.get_running_loop().time() > deadline:
            return now
        await asyncio.sleep(_LOOK_SECONDS)
