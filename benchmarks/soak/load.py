"""Sends the requests: so many in all, so many at once, of random kinds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import grpc

from benchmarks.soak.http_client import HttpConnection
from benchmarks.soak.kinds import KINDS, Kind, Lane
from deploy.local.cluster import LocalCluster
from deploy.local.topology import HOST, Deployment
from switchgear.inference.v1 import inference_pb2_grpc
from switchgear.router.v1 import router_pb2_grpc

ANSWER_SECONDS = 60.0
"""An answer that takes longer counts as lost."""

_WEIGHTS = [kind.weight for kind in KINDS]


class Load:
    """The clients of one deployment."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.finished_requests = 0
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """By kind and outcome."""
        self._lanes = lanes

    async def send(self, requests: int) -> None:
        """Returns when so many more have ended, with all HTTP connections closed."""
        numbers = iter(range(self.finished_requests, self.finished_requests + requests))
        async with asyncio.TaskGroup() as clients:
            for lane in self._lanes:
                clients.create_task(self._run(lane, numbers))

    async def _run(self, lane: Lane, numbers: Iterator[int]) -> None:
        for number in numbers:
            [kind] = lane.random.choices(KINDS, _WEIGHTS)
            self.outcomes[kind.name, await _outcome(kind, lane, number)] += 1
            self.finished_requests += 1
        lane.http.abort()


async def _outcome(kind: Kind, lane: Lane, number: int) -> str:
    """An answer that fails is a finding like any other."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await kind.send(lane, number)
    except (OSError, TimeoutError, grpc.aio.AioRpcError) as error:
        lane.http.abort()
        return type(error).__name__


@asynccontextmanager
async def loading(
    cluster: LocalCluster, deployment: Deployment, *, clients: int, seed: int
) -> AsyncIterator[Load]:
    """So many clients, whose gRPC channels stay open while the body runs."""

    def channel(name: str) -> grpc.aio.Channel:
        port = cluster.process(name).spec.ports["grpc"]
        return grpc.aio.insecure_channel(f"{HOST}:{port}")

    async with channel("frontend-0") as frontend_channel, channel("router-0") as router_channel:
        frontend: inference_pb2_grpc.InferenceServiceAsyncStub = (
            inference_pb2_grpc.InferenceServiceStub(frontend_channel)
        )
        router: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(
            router_channel
        )
        yield Load(
            [
                Lane(
                    deployment.model_name,
                    HttpConnection(HOST, deployment.http_port),
                    frontend,
                    router,
                    Random(f"{seed}-{number}"),
                )
                for number in range(clients)
            ]
        )
