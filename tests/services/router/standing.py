"""A router on its own: real gRPC, simulated workers, tables in place of etcd, a told indexer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from google.protobuf import struct_pb2

from libs.common import hashing
from libs.common.discovery import Table
from libs.common.grpc_server import serving
from libs.common.tasks import background
from libs.engine.sim.settings import SimSettings
from services.router.config import RouterSettings
from services.router.degraded import Degraded
from services.router.fleet import Fleet
from services.router.live_settings import LiveSettings
from services.router.overlap_client import OverlapClient
from services.router.servicer import RouterServicer
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.workers import MODEL, SimWorker, sim_worker

PREFILL = discovery_pb2.ROLE_PREFILL_WORKER
DECODE = discovery_pb2.ROLE_DECODE_WORKER
LONG_PROMPT = list(range(2000, 2400))


class FakeIndexer(kv_indexer_pb2_grpc.KvIndexerServiceServicer):
    """Says what a test tells it, of prompts of any content."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.lacking: dict[str, list[int]] = {}
        """Workers by the reason why it may have their blocks wrong."""
        self.queries = 0

    async def FindOverlap(
        self, request: kv_indexer_pb2.FindOverlapRequest, context: object
    ) -> kv_indexer_pb2.FindOverlapResponse:
        self.queries += len(request.queries)
        return kv_indexer_pb2.FindOverlapResponse(
            overlaps=[
                kv_indexer_pb2.Overlap(instance_ids=self.blocks, blocks=self.blocks.values())
                for _ in request.queries
            ],
            degraded_reasons=[
                kv_indexer_pb2.DegradedReason(reason=reason, instance_ids=instances)
                for reason, instances in self.lacking.items()
            ],
        )

    async def Session(
        self,
        request_iterator: AsyncIterator[kv_indexer_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[kv_indexer_pb2.SessionResponse]:
        async for request in request_iterator:
            answer = await self.FindOverlap(request.find_overlap, context)
            yield kv_indexer_pb2.SessionResponse(find_overlap=answer)

    async def GetStatus(
        self, request: kv_indexer_pb2.GetStatusRequest, context: object
    ) -> kv_indexer_pb2.GetStatusResponse:
        return kv_indexer_pb2.GetStatusResponse()


class Stand:
    """A router, its workers, and one frontend's stub."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.instances: Table[discovery_pb2.Instance] = Table()
        self.cards: Table[discovery_pb2.ModelCard] = Table()
        self.live_settings: Table[struct_pb2.Value] = Table()
        self.indexer = FakeIndexer()  # type: ignore[abstract]
        self.workers: dict[str, SimWorker] = {}
        """Those that were added, by name."""
        self.fleet: Fleet
        self.stub: router_pb2_grpc.RouterServiceAsyncStub

    async def add(
        self,
        role: discovery_pb2.Role.ValueType,
        name: str,
        settings: SimSettings | None = None,
        *,
        max_waiting_requests: int = 100,
        publishes_kv_events: bool = True,
    ) -> SimWorker:
        """Starts a worker and waits until the router is connected to it."""
        worker = await self._stack.enter_async_context(
            sim_worker(
                role,
                name,
                settings,
                max_waiting_requests=max_waiting_requests,
                publishes_kv_events=publishes_kv_events,
            )
        )
        self.workers[name] = worker
        self.enlist(worker.instance, worker.card)
        await until(lambda: self.is_available(name))
        return worker

    def enlist(self, instance: discovery_pb2.Instance, card: discovery_pb2.ModelCard) -> None:
        """Puts a worker into discovery."""
        self.instances.replace({**self.instances.entries, (instance.name,): instance})
        self.cards.replace({**self.cards.entries, (instance.name,): card})

    def unlist(self, name: str) -> None:
        """Takes a worker out of discovery."""
        self.instances.replace({k: v for k, v in self.instances.entries.items() if k != (name,)})
        self.cards.replace({k: v for k, v in self.cards.entries.items() if k != (name,)})

    def is_available(self, name: str) -> bool:
        """Whether the router would give it requests."""
        return any(w.name == name and w.is_available for w in self.fleet.workers)


@asynccontextmanager
async def standing(**settings: object) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        stand = Stand(stack)

        def add_indexer(server: grpc.aio.Server) -> None:
            kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server(stand.indexer, server)

        indexer = await stack.enter_async_context(serving("127.0.0.1", 0, add_indexer, []))
        indexers: Table[discovery_pb2.Instance] = Table()
        indexers.replace(
            {("1",): discovery_pb2.Instance(address=f"127.0.0.1:{indexer.port}", name="i")}
        )
        degraded = Degraded()
        stand.fleet = Fleet(stand.instances, stand.cards)
        overlaps = OverlapClient(
            indexers, timeout_seconds=5, degraded=degraded, worker_name=stand.fleet.name_of
        )
        await stack.enter_async_context(background(overlaps.run()))
        stack.push_async_callback(stand.fleet.close)
        start = RouterSettings.model_validate({"drain_seconds": 0, **settings})
        servicer = RouterServicer(
            stand.fleet, overlaps, LiveSettings(start, stand.live_settings), degraded
        )

        def add_router(server: grpc.aio.Server) -> None:
            router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)

        server = await stack.enter_async_context(
            serving("127.0.0.1", 0, add_router, [], grace_seconds=0)
        )
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        )
        stand.stub = router_pb2_grpc.RouterServiceStub(channel)
        yield stand


def generation(
    prompt: list[int], max_tokens: int, request_id: str = "r"
) -> generation_pb2.Generation:
    return generation_pb2.Generation(
        request_id=request_id,
        model=MODEL,
        token_ids=prompt,
        stopping=generation_pb2.StoppingOptions(max_tokens=max_tokens),
    )


async def generate(
    stand: Stand, prompt: list[int], max_tokens: int = 5, timeout: float = 20
) -> tuple[list[int], router_pb2.Routed]:
    """Tokens and route of one plain call."""
    tokens: list[int] = []
    routed = router_pb2.Routed()
    call = stand.stub.Generate(
        router_pb2.GenerateRequest(generation=generation(prompt, max_tokens)), timeout=timeout
    )
    async for response in call:
        tokens.extend(response.token_ids)
        if response.HasField("routed"):
            routed = response.routed
    return tokens, routed


class Session:
    """A frontend's session, in the plainest way."""

    def __init__(self, stand: Stand, window: int = 32) -> None:
        self.call = stand.stub.Session()
        self._window = window
        self._received = 0
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, int] = {}
        self.failures: dict[int, router_pb2.Failure] = {}
        self.routed: dict[int, router_pb2.Routed] = {}
        self.most_outputs = 0
        """Of one message."""

    async def open(self) -> None:
        await self.call.write(router_pb2.SessionRequest(window_responses=self._window))

    async def submit(
        self, handle: int, prompt: list[int], max_tokens: int, traceparent: str = ""
    ) -> None:
        await self.submit_all({handle: prompt}, max_tokens, traceparent)

    async def submit_all(
        self, prompts: Mapping[int, list[int]], max_tokens: int, traceparent: str = ""
    ) -> None:
        """Prompts by handle, in one message."""
        await self.call.write(
            router_pb2.SessionRequest(
                submits=[
                    router_pb2.Submit(
                        handle=handle,
                        generation=generation(prompt, max_tokens, f"r{handle}").SerializeToString(),
                        routing=router_pb2.RoutingRequest(
                            request_id=f"r{handle}",
                            model=MODEL,
                            prompt_tokens=len(prompt),
                            block_size_tokens=16,
                            sequence_hashes=hashing.sequence_hashes(prompt, 16),
                            traceparent=traceparent,
                        ),
                    )
                    for handle, prompt in prompts.items()
                ],
                consumed_responses=self._received,
            )
        )

    async def cancel(self, handle: int) -> None:
        await self.call.write(
            router_pb2.SessionRequest(cancels=[handle], consumed_responses=self._received)
        )

    async def read(self) -> None:
        """Takes one message in and gives credit for it."""
        async with asyncio.timeout(10):
            message = await self.call.read()
        assert isinstance(message, router_pb2.SessionResponse), "the session ended"
        self._received += 1
        self.most_outputs = max(self.most_outputs, len(message.outputs))
        for routed in message.routed:
            self.routed[routed.handle] = routed
        for serialised in message.outputs:
            outputs = outputs_pb2.StepOutputs.FromString(serialised)
            counts = outputs.token_counts or [1] * len(outputs.handles)
            tokens = iter(outputs.token_ids)
            for handle, count in zip(outputs.handles, counts, strict=True):
                assert handle not in self.finished
                self.tokens.setdefault(handle, []).extend(next(tokens) for _ in range(count))
            for finish in outputs.finishes:
                self.finished[finish.handle] = finish.reason
        for failure in message.failures:
            self.failures[failure.handle] = failure
        await self.call.write(router_pb2.SessionRequest(consumed_responses=self._received))

    async def read_to_the_end(self) -> None:
        """Raises what the router ended the session with."""
        async with asyncio.timeout(10):
            while await self.call.read() is not grpc.aio.EOF:
                pass

    async def read_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            await self.read()
