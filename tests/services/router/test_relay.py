"""The router's service over real gRPC, with simulated workers, and tables in place of etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from libs.common import hashing
from libs.common.discovery import Table
from libs.common.grpc_errors import from_rpc_error
from libs.common.grpc_server import serving
from libs.common.tasks import background
from libs.engine.sim.settings import SimSettings
from services.router.config import RouterSettings
from services.router.fleet import Fleet
from services.router.overlap_client import OverlapClient
from services.router.servicer import RouterServicer
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.workers import FILES, MODEL, SimWorker, sim_worker

PREFILL = discovery_pb2.ROLE_PREFILL_WORKER
DECODE = discovery_pb2.ROLE_DECODE_WORKER
SLOW = SimSettings(timing="fixed", step_ms=20)
LONG_PROMPT = list(range(2000, 2400))


class FakeIndexer(kv_indexer_pb2_grpc.KvIndexerServiceServicer):
    """Says what a test tells it, of prompts of any content."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}

    async def FindOverlap(
        self, request: kv_indexer_pb2.FindOverlapRequest, context: object
    ) -> kv_indexer_pb2.FindOverlapResponse:
        return kv_indexer_pb2.FindOverlapResponse(
            overlaps=[
                kv_indexer_pb2.Overlap(instance_ids=self.blocks, blocks=self.blocks.values())
                for _ in request.queries
            ]
        )

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
        self.indexer = FakeIndexer()
        self.workers: dict[str, SimWorker] = {}
        self.fleet: Fleet
        self.stub: router_pb2_grpc.RouterServiceAsyncStub

    async def add(
        self,
        role: discovery_pb2.Role.ValueType,
        name: str,
        settings: SimSettings | None = None,
        *,
        max_waiting_requests: int = 100,
    ) -> SimWorker:
        """Starts a worker and waits until the router is connected to it."""
        worker = await self._stack.enter_async_context(
            sim_worker(role, name, settings, max_waiting_requests=max_waiting_requests)
        )
        self.workers[name] = worker
        self._publish()
        await until(lambda: self._is_available(name))
        return worker

    def _publish(self) -> None:
        self.instances.replace(
            {(str(w.instance.instance_id),): w.instance for w in self.workers.values()}
        )
        self.cards.replace({(str(w.card.instance_id),): w.card for w in self.workers.values()})

    def unlist(self, name: str) -> None:
        """Takes a worker out of discovery."""
        del self.workers[name]
        self._publish()

    def _is_available(self, name: str) -> bool:
        return any(w.name == name and w.is_available for w in self.fleet.workers)


@asynccontextmanager
async def _stand(**settings: object) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        stand = Stand(stack)

        def add_indexer(server: grpc.aio.Server) -> None:
            kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server(stand.indexer, server)

        indexer = await stack.enter_async_context(serving("127.0.0.1", 0, add_indexer, []))
        indexers: Table[discovery_pb2.Instance] = Table()
        indexers.replace(
            {("1",): discovery_pb2.Instance(address=f"127.0.0.1:{indexer.port}", name="i")}
        )
        overlaps = OverlapClient(indexers, timeout_seconds=5)
        await stack.enter_async_context(background(overlaps.run()))
        stand.fleet = Fleet(stand.instances, stand.cards)
        stack.push_async_callback(stand.fleet.close)
        servicer = RouterServicer(
            stand.fleet, overlaps, RouterSettings.model_validate({"drain_seconds": 0, **settings})
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


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with _stand() as made:
        yield made


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

    async def open(self) -> None:
        await self.call.write(router_pb2.SessionRequest(window_responses=self._window))

    async def submit(self, handle: int, prompt: list[int], max_tokens: int) -> None:
        hashes = hashing.sequence_hashes(prompt, 16)
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
                            sequence_hashes=hashes,
                        ),
                    )
                ],
                consumed_responses=self._received,
            )
        )

    async def read(self) -> None:
        """Takes one message in and gives credit for it."""
        async with asyncio.timeout(10):
            message = await self.call.read()
        assert isinstance(message, router_pb2.SessionResponse), "the session ended"
        self._received += 1
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


async def test_a_short_prompt_is_served_whole(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    tokens, routed = await generate(stand, [5, 6, 7])
    assert len(tokens) == 5
    assert routed.decode_worker.name == "d"
    assert not routed.HasField("prefill_worker")


async def test_a_long_prompt_is_prefilled_elsewhere_and_gives_the_same_tokens(
    stand: Stand,
) -> None:
    await stand.add(DECODE, "d")
    whole, _ = await generate(stand, LONG_PROMPT, 20)
    await stand.add(PREFILL, "p")
    await stand.workers["d"].die()
    stand.unlist("d")
    await stand.add(DECODE, "d2")
    tokens, routed = await generate(stand, LONG_PROMPT, 20)
    assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p", "d2")
    assert tokens == whole
    assert stand.workers["d2"].engine.counters().transferred_blocks == 25


async def test_an_unknown_model_is_not_found(stand: Stand) -> None:
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=generation([1], 1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).reason == "MODEL_NOT_FOUND"


async def test_a_model_with_prefill_workers_only_is_not_ready(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=generation([1], 1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(caught.value).reason == "NO_LIVE_INSTANCE"


async def test_the_worker_that_holds_the_prefix_gets_the_request(stand: Stand) -> None:
    await stand.add(DECODE, "d0")
    holder = await stand.add(DECODE, "d1")
    stand.indexer.blocks = {holder.instance.instance_id: 20}
    for _ in range(3):
        _, routed = await generate(stand, LONG_PROMPT, 1)
        assert routed.decode_worker.name == "d1"


async def test_a_dead_prefill_worker_costs_nothing_but_its_help() -> None:
    async with _stand() as stand:
        await stand.add(PREFILL, "p", SimSettings(timing="default", chunk_tokens=256))
        await stand.add(DECODE, "d")
        session = Session(stand)
        await session.open()
        prompt = list(range(20_000))
        await session.submit(1, prompt, 3)
        prefill = stand.workers["p"].host
        await until(lambda: not prefill.idle.is_set())
        await stand.workers["p"].die()
        await session.read_until(lambda: 1 in session.finished)
        assert len(session.tokens[1]) == 3
        assert not session.routed[1].HasField("prefill_worker")
        assert session.failures == {}
        session.call.cancel()


async def test_a_prefill_worker_that_takes_too_long_is_given_up() -> None:
    async with _stand(prefill_timeout_seconds=0.05) as stand:
        await stand.add(PREFILL, "p", SimSettings(timing="default", chunk_tokens=256))
        await stand.add(DECODE, "d")
        tokens, routed = await generate(stand, list(range(20_000)), 3)
        assert len(tokens) == 3
        assert not routed.HasField("prefill_worker")
        await until(stand.workers["p"].host.idle.is_set)


async def test_a_lost_decode_worker_is_reported_for_migration(stand: Stand) -> None:
    lost = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1, 2, 3], 1000)
    await session.read_until(lambda: len(session.tokens.get(1, [])) >= 3)
    await lost.die()
    await session.read_until(lambda: 1 in session.failures)
    failure = session.failures[1]
    assert failure.error.reason == "WORKER_LOST"
    assert failure.error.retryable
    assert failure.failed_instance_id == lost.instance.instance_id
    assert not any(worker.is_available for worker in stand.fleet.workers)
    session.call.cancel()


async def test_cancelling_reaches_the_engine(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1, 2, 3], 100_000)
    await session.read_until(lambda: bool(session.tokens.get(1)))
    await session.call.write(router_pb2.SessionRequest(cancels=[1, 77]))
    await until(worker.host.idle.is_set)
    assert worker.engine.load().active_kv_blocks == 0
    session.call.cancel()


async def test_a_frontend_that_goes_away_leaves_nothing_running(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    for handle in range(1, 6):
        await session.submit(handle, [handle], 100_000)
    await session.read_until(lambda: len(session.tokens) == 5)
    session.call.cancel()
    await until(worker.host.idle.is_set)


async def test_a_refused_request_is_tried_on_another_worker(stand: Stand) -> None:
    full = await stand.add(DECODE, "full")
    full.host.is_draining = True
    await stand.add(DECODE, "free")
    stand.indexer.blocks = {full.instance.instance_id: 20}
    tokens, routed = await generate(stand, LONG_PROMPT, 4)
    assert len(tokens) == 4
    assert routed.decode_worker.name == "free"


async def test_when_everyone_refuses_the_refusal_is_the_answer(stand: Stand) -> None:
    settings = SimSettings(timing="fixed", step_ms=20, max_running_requests=1)
    await stand.add(DECODE, "d", settings, max_waiting_requests=1)
    session = Session(stand)
    await session.open()
    for handle in range(1, 6):
        await session.submit(handle, [handle], 10_000)
    await session.read_until(lambda: bool(session.failures))
    assert {failure.error.reason for failure in session.failures.values()} == {"OVERLOADED"}
    session.call.cancel()


async def test_a_bad_parameter_is_named_and_not_retried(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    request = generation([1], 0)
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=request))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens" in (caught.value.details() or "")


async def test_a_deadline_ends_the_request_in_the_engine(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stand, [1], 100_000, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(worker.host.idle.is_set)


async def test_a_frontend_that_does_not_read_gets_merged_steps(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    session = Session(stand, window=1)
    await session.open()
    await session.submit(1, [1, 2, 3], 300)
    worker = stand.workers["d"]
    await until(lambda: not worker.host.idle.is_set())
    await until(worker.host.idle.is_set)
    reads = 0
    while 1 not in session.finished:
        await session.read()
        reads += 1
    assert len(session.tokens[1]) == 300
    # Without credit, everything after the first few messages waited and was merged.
    assert reads < 100
    session.call.cancel()


async def test_a_handle_used_twice_ends_the_session(stand: Stand) -> None:
    await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1], 1000)
    await session.submit(1, [1], 1000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.read_to_the_end()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bookings_are_gone_once_the_worker_counts_the_requests(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    await asyncio.gather(*(generate(stand, LONG_PROMPT, 3) for _ in range(10)))
    for worker in stand.fleet.workers:
        await until(lambda worker=worker: worker.booked_requests == 0)  # type: ignore[misc]
        assert (worker.booked_prefill_tokens, worker.booked_kv_blocks) == (0, 0)


async def test_select_worker_explains_without_running(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    holder = await stand.add(DECODE, "d0")
    await stand.add(DECODE, "d1")
    stand.indexer.blocks = {holder.instance.instance_id: 2}
    response = await stand.stub.SelectWorker(
        router_pb2.SelectWorkerRequest(
            routing=router_pb2.RoutingRequest(
                request_id="r",
                model=MODEL,
                prompt_tokens=64,
                block_size_tokens=16,
                sequence_hashes=hashing.sequence_hashes(range(64), 16),
            )
        )
    )
    assert response.decode_worker.name == "d0"
    assert [c.worker.name for c in response.decode_candidates] == ["d0", "d1"]
    # 64 tokens, 32 of them held: 32 to compute and 2 blocks of 16 to add.
    assert [c.cost for c in response.decode_candidates] == [64, 128]
    assert all(worker.host.idle.is_set() for worker in stand.workers.values())


async def test_model_files_arrive_whole(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d")
    async with grpc.aio.insecure_channel(worker.instance.address) as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        got: dict[str, bytes] = {}
        async for piece in stub.GetModelFiles(worker_pb2.GetModelFilesRequest(model=MODEL)):
            got[piece.name] = got.get(piece.name, b"") + piece.data
        assert got == FILES
