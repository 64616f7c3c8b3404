"""etcd, NATS, decode workers with simulated engines, and KV indexers: all that an index needs."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from deploy.local import topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.topology import Deployment
from libs.common.grpc_server import CHANNEL_OPTIONS
from libs.common.tasks import background
from services.kv_indexer import verify
from switchgear.common.v1 import generation_pb2
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

MODEL = "test-model"
BLOCK_SIZE_TOKENS = 16
SPARE_BLOCKS = 4_096
"""Room beyond what a worker is filled with. When load has filled it, blocks are removed, too."""

FILL_PROMPT_BLOCKS = 1_024
LOAD_PROMPT_BLOCKS = 32
FILLS_AT_ONCE = 4
READY_SECONDS = 60.0
CALL_SECONDS = 10.0
POLL_SECONDS = 0.01

Position = tuple[int, int]
"""Epoch and sequence number of a worker's last batch."""


class NotRight(Exception):
    """The index did not become right in time, or said it was and was not."""


@dataclass(frozen=True)
class IndexDeployment:
    """What runs, and how to reach it."""

    cluster: LocalCluster
    workers: Sequence[str]
    indexers: Sequence[str]

    def address(self, name: str) -> str:
        return f"{topology.HOST}:{self.cluster.process(name).spec.ports['grpc']}"

    async def restart(self, name: str) -> None:
        """Starts a process anew, dead or alive. Returns when it is ready."""
        await asyncio.to_thread(self.cluster.restart, name, READY_SECONDS)

    async def fill(self, worker: str, blocks: int, seed: int) -> None:
        """Has a worker compute prompts of so many blocks in all."""
        prompts = [FILL_PROMPT_BLOCKS] * (blocks // FILL_PROMPT_BLOCKS)
        prompts += [rest] if (rest := blocks % FILL_PROMPT_BLOCKS) else []
        at_once = asyncio.Semaphore(FILLS_AT_ONCE)
        async with self._stub(worker) as stub:

            async def one(number: int, of_blocks: int) -> None:
                async with at_once:
                    await _generate(stub, of_blocks, f"{worker} {seed} {number}")

            await asyncio.gather(*itertools.starmap(one, enumerate(prompts)))

    @asynccontextmanager
    async def under_load(self, seed: int) -> AsyncIterator[None]:
        """Each worker computes one new prompt after another while the body runs."""
        async with AsyncExitStack() as stack:
            for worker in self.workers:
                await stack.enter_async_context(background(self._load(worker, seed)))
            yield

    async def positions(self) -> dict[int, Position]:
        """How far each worker is now, by instance id."""

        async def one(worker: str) -> tuple[int, Position]:
            async with grpc.aio.insecure_channel(
                self.address(worker), options=CHANNEL_OPTIONS
            ) as channel:
                pieces = worker_pb2_grpc.WorkerServiceStub(channel).GetKvSnapshot(
                    worker_pb2.GetKvSnapshotRequest(), timeout=CALL_SECONDS, wait_for_ready=True
                )
                async for piece in pieces:
                    return piece.instance_id, (piece.epoch, piece.sequence_number)
            raise NotRight(f"{worker} sent an empty snapshot")

        return dict(await asyncio.gather(*map(one, self.workers)))

    async def until_right(
        self, positions: dict[int, Position], since: float, timeout_seconds: float
    ) -> dict[str, float]:
        """Seconds from `since` (of time.monotonic) until each indexer followed exactly these
        workers, had come to these positions and called nothing degraded.

        Then has every indexer verify itself. Raises NotRight when that finds a difference, or in
        `timeout_seconds` there was nothing to verify.
        """
        waited = await asyncio.gather(
            *(self._until_at(name, positions, timeout_seconds) for name in self.indexers)
        )
        for name in self.indexers:
            answer = await verify.ask(name, self.address(name), CALL_SECONDS)
            if verify.verdict(answer) != verify.EQUAL:
                raise NotRight(verify.table([answer], {}))
        return {name: at - since for name, at in zip(self.indexers, waited, strict=True)}

    async def verified(self) -> str:
        """Every indexer's comparison, as a table."""
        asked = (verify.ask(name, self.address(name), CALL_SECONDS) for name in self.indexers)
        return verify.table(await asyncio.gather(*asked), {})

    async def _until_at(
        self, indexer: str, positions: dict[int, Position], timeout_seconds: float
    ) -> float:
        said = "nothing"
        async with grpc.aio.insecure_channel(
            self.address(indexer), options=CHANNEL_OPTIONS
        ) as channel:
            stub: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
                kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            )
            try:
                async with asyncio.timeout(timeout_seconds):
                    while True:
                        status = await stub.GetStatus(
                            kv_indexer_pb2.GetStatusRequest(), wait_for_ready=True
                        )
                        if _is_at(status, positions):
                            return time.monotonic()
                        said = str(status)
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError:
                raise NotRight(f"{indexer} is not at {positions}, but says: {said}") from None

    async def _load(self, worker: str, seed: int) -> None:
        async with self._stub(worker) as stub:
            for number in itertools.count():
                await _generate(stub, LOAD_PROMPT_BLOCKS, f"load {worker} {seed} {number}")

    @asynccontextmanager
    async def _stub(
        self, worker: str
    ) -> AsyncIterator[decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub]:
        async with grpc.aio.insecure_channel(
            self.address(worker), options=CHANNEL_OPTIONS
        ) as channel:
            yield decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)


@contextmanager
def running(
    run_dir: Path,
    model: Path,
    *,
    workers: int,
    indexers: int,
    blocks: int,
    indexer_flags: tuple[str, ...] = (),
) -> Iterator[IndexDeployment]:
    """Starts the processes and waits until they serve; stops them at the end. Each worker has room
    for `blocks` and a few more. `model` is a folder with a tokenizer."""
    ports = FreePorts()
    kv_tokens = (blocks + SPARE_BLOCKS) * BLOCK_SIZE_TOKENS
    deployment = Deployment(
        engine="sim",
        model=model,
        model_name=MODEL,
        prefill=0,
        decode=workers,
        indexers=indexers,
        http_port=ports.take(),
        sim_step_ms=1.0,
        flags={
            "decode_worker": ("--sim-kv-tokens", str(kv_tokens)),
            "kv_indexer": indexer_flags,
        },
    )
    specs = [
        spec
        for spec in topology.processes(deployment, run_dir, ports.take)
        if not spec.name.startswith(("router", "frontend"))
    ]
    with LocalCluster(run_dir) as cluster:
        cluster.start(specs)
        cluster.wait_ready(READY_SECONDS)
        names = [spec.name for spec in specs]
        yield IndexDeployment(
            cluster,
            [name for name in names if name.startswith("decode_worker")],
            [name for name in names if name.startswith("kv_indexer")],
        )


async def _generate(
    stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub, blocks: int, seed: str
) -> None:
    """One prompt that nobody had before, and one token."""
    tokens = random.Random(seed).choices(range(1_000, 40_000), k=blocks * BLOCK_SIZE_TOKENS)
    call = stub.Generate(
        decode_worker_pb2.GenerateRequest(
            generation=generation_pb2.Generation(
                request_id=seed,
                model=MODEL,
                token_ids=tokens,
                stopping=generation_pb2.StoppingOptions(max_tokens=1),
            )
        ),
        timeout=READY_SECONDS,
        wait_for_ready=True,
    )
    async for _ in call:
        pass


def _is_at(status: kv_indexer_pb2.GetStatusResponse, positions: dict[int, Position]) -> bool:
    found = {
        worker.instance_id: (worker.epoch, worker.sequence_number)
        for worker in status.workers
        if not worker.degraded_reason
    }
    return (
        len(status.workers) == len(positions)
        and found.keys() == positions.keys()
        and all(
            found[instance][0] == epoch and found[instance][1] >= number
            for instance, (epoch, number) in positions.items()
        )
    )
