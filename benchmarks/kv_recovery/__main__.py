"""How long the KV index is wrong after a fault: `python -m benchmarks.kv_recovery --help`."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.kv_recovery import faults
from benchmarks.kv_recovery.deployment import IndexDeployment, running
from deploy.local import default_model

_FILL_SECONDS = 600.0


def main(
    blocks: Annotated[int, typer.Option(min=1, help="That each worker holds.")] = 100_000,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    indexers: Annotated[int, typer.Option(min=1)] = 2,
    outage_seconds: Annotated[float, typer.Option(min=0, help="That NATS is gone.")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Break things, and print how long each indexer took to be equal to the workers again."""
    with (
        tempfile.TemporaryDirectory(prefix="switchgear-kv-recovery-") as folder,
        running(
            Path(folder),
            default_model.tokenizer_folder(print),
            workers=workers,
            indexers=indexers,
            blocks=blocks,
        ) as deployment,
    ):
        asyncio.run(_measure(deployment, blocks, outage_seconds, rounds))


async def _measure(
    deployment: IndexDeployment, blocks: int, outage_seconds: float, rounds: int
) -> None:
    async with asyncio.timeout(_FILL_SECONDS):
        for worker in deployment.workers:
            await deployment.fill(worker, blocks, seed=0)
    await deployment.until_right(
        await deployment.positions(), time.monotonic(), faults.RIGHT_SECONDS
    )
    print(f"{len(deployment.workers)} workers with {blocks:,} blocks each\n")
    first_indexer, first_worker = deployment.indexers[0], deployment.workers[0]
    for number in range(1, rounds + 1):

        async def restart_indexer(seed: int = number) -> Iterable[float]:
            took = await faults.indexer_restart(deployment, first_indexer, seed)
            return [took[first_indexer]]

        async def break_nats(seed: int = number) -> Iterable[float]:
            return (await faults.nats_outage(deployment, outage_seconds, seed)).values()

        await _report(f"{first_indexer} killed and restarted under load", restart_indexer)
        await _report(f"NATS gone for {outage_seconds:.0f} s under load", break_nats)
    took = await faults.worker_restart(deployment, first_worker, seed=rounds + 1)
    _print(f"{first_worker} killed and restarted at its address", took.values())
    print(f"\n{await deployment.verified()}")


async def _report(what: str, fault: Callable[[], Coroutine[Any, Any, Iterable[float]]]) -> None:
    _print(what, await fault())


def _print(what: str, seconds: Iterable[float]) -> None:
    print(f"{what:<50}" + "".join(f" {each:7.3f} s" for each in seconds))


if __name__ == "__main__":
    typer.run(main)
