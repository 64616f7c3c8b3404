"""What may break. Each returns the seconds that each indexer took to be right again, from when the
broken part began to run again, and raises NotRight if one was not."""

from __future__ import annotations

import asyncio
import time

from benchmarks.kv_recovery.deployment import IndexDeployment

RIGHT_SECONDS = 60.0
"""After that the index counts as broken for good."""

REFILL_BLOCKS = 2_048


async def nats_outage(
    deployment: IndexDeployment, outage_seconds: float, seed: int = 0
) -> dict[str, float]:
    """NATS is gone for a while, and the workers' caches change all that time."""
    deployment.cluster.kill("nats-0")
    async with deployment.under_load(seed):
        await asyncio.sleep(outage_seconds)
    positions = await deployment.positions()
    await deployment.restart("nats-0")
    return await deployment.until_right(positions, time.monotonic(), RIGHT_SECONDS)


async def indexer_restart(
    deployment: IndexDeployment, indexer: str, seed: int = 0
) -> dict[str, float]:
    """An indexer is killed and started again while the workers' caches change. Counted from when
    it serves; what takes longer is to start a process."""
    async with deployment.under_load(seed):
        deployment.cluster.kill(indexer)
        positions = await deployment.positions()
        await deployment.restart(indexer)
        return await deployment.until_right(positions, time.monotonic(), RIGHT_SECONDS)


async def worker_restart(
    deployment: IndexDeployment, worker: str, seed: int = 0
) -> dict[str, float]:
    """A worker is killed and comes back at the same address with an empty cache, to which new
    prompts come at once."""
    deployment.cluster.kill(worker)
    await deployment.restart(worker)
    since = time.monotonic()
    await deployment.fill(worker, REFILL_BLOCKS, seed)
    return await deployment.until_right(await deployment.positions(), since, RIGHT_SECONDS)
