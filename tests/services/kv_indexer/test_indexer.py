"""The indexer in process: real gRPC and NATS, workers that have a cache but no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nats.aio.client import Client
from structlog.testing import capture_logs

from libs.common.discovery import Discovery
from libs.common.errors import WorkerLost
from libs.common.grpc_server import serving
from libs.common.hashing import sequence_hashes
from libs.common.kv_events import KvSnapshot
from libs.common.nats_client import connecting, connection_number
from libs.common.tasks import background
from libs.engine.interface import EngineBlocksRemoved, EngineBlocksStored, EngineHash
from libs.worker import kv_publisher
from libs.worker.kv_publisher import KvPublisher
from services.kv_indexer import indexer as indexer_module
from services.kv_indexer import metrics
from services.kv_indexer.batches import fetch_batches
from services.kv_indexer.config import KvIndexerSettings
from services.kv_indexer.core.follower import BatchRange
from services.kv_indexer.core.index import FastestIndex
from services.kv_indexer.events import receiving
from services.kv_indexer.indexer import Indexer
from services.kv_indexer.main import live_workers, serve
from services.kv_indexer.servicer import SERVICE_NAME, KvIndexerServicer
from services.kv_indexer.snapshots import Worker, fetch_snapshot
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.eventually import WAIT_SECONDS, eventually, until
from tests.fixtures.servers import ServerProcess

MODEL, BLOCK_SIZE_TOKENS, NAMESPACE = "m", 2, "test"


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """A worker whose engine's cache is told to it."""

    def __init__(self, instance: int, nats: Client) -> None:
        self.instance = instance
        self.address = ""
        self.snapshots = 0
        self.ranges = 0
        self._nats = nats
        self.restart()

    def restart(self) -> None:
        """A new engine, with an empty cache."""
        self.publisher = KvPublisher(
            self._nats,
            namespace=NAMESPACE,
            instance_id=self.instance,
            model=MODEL,
            block_size_tokens=BLOCK_SIZE_TOKENS,
        )
        self.truth: set[int] = set()

    def store(self, *tokens: int) -> None:
        hashes = sequence_hashes(tokens, BLOCK_SIZE_TOKENS)
        self.truth.update(hashes)
        names = tuple(EngineHash(h.to_bytes(8)) for h in hashes)
        self.publisher.take([EngineBlocksStored(names, None, tokens)])

    def remove(self, *tokens: int) -> None:
        """The last block of the prompt; nothing may follow it."""
        last = sequence_hashes(tokens, BLOCK_SIZE_TOKENS)[-1]
        self.truth.discard(last)
        self.publisher.take([EngineBlocksRemoved((EngineHash(last.to_bytes(8)),))])

    async def GetKvSnapshot(
        self, request: worker_pb2.GetKvSnapshotRequest, context: object
    ) -> AsyncIterator[worker_pb2.GetKvSnapshotResponse]:
        self.snapshots += 1
        for piece in self.publisher.snapshot():
            yield piece

    async def GetKvBatches(
        self, request: worker_pb2.GetKvBatchesRequest, context: object
    ) -> AsyncIterator[worker_pb2.GetKvBatchesResponse]:
        self.ranges += 1
        for piece in self.publisher.batches(
            request.epoch, request.first_sequence_number, request.last_sequence_number
        ):
            yield piece

    @property
    def as_discovered(self) -> Worker:
        return Worker(self.instance, self.address, MODEL, BLOCK_SIZE_TOKENS)


@asynccontextmanager
async def fake_worker(instance: int, nats_url: str) -> AsyncIterator[FakeWorker]:
    """A worker that answers, but does not publish by itself: see `publishing`."""
    async with connecting(nats_url, f"worker-{instance}") as nats:
        worker = FakeWorker(instance, nats)  # type: ignore[abstract]
        add = partial(worker_pb2_grpc.add_WorkerServiceServicer_to_server, worker)
        async with serving("127.0.0.1", 0, add, []) as server:
            worker.address = f"127.0.0.1:{server.port}"
            yield worker


class LossyReceiver:
    """Passes KV events on to an indexer, unless told to lose them."""

    def __init__(self, indexer: Indexer) -> None:
        self.indexer = indexer
        self.has_received = False
        self.is_losing = False
        self.lost: list[kv_events_pb2.KvEventBatch] = []

    def take(self, batch: kv_events_pb2.KvEventBatch) -> None:
        self.has_received = True
        if self.is_losing:
            self.lost.append(batch)
        else:
            self.indexer.take(batch)


@asynccontextmanager
async def indexer_on(nats_url: str) -> AsyncIterator[tuple[Indexer, LossyReceiver]]:
    async with connecting(nats_url, "kv_indexer") as nats:
        indexer = Indexer(
            index=FastestIndex(1 << 30),
            fetch_snapshot=partial(fetch_snapshot, timeout_seconds=5),
            fetch_batches=partial(fetch_batches, timeout_seconds=5),
            events_connection=lambda: connection_number(nats),
            silent_after_seconds=60,
            recoveries_at_once=2,
        )
        receiver = LossyReceiver(indexer)
        async with background(indexer.run()), receiving(nats, NAMESPACE, receiver.take):
            yield indexer, receiver


def degraded_reasons(indexer: Indexer) -> list[str]:
    return [status.degraded_reason for status in indexer.statuses()]


async def in_step(indexer: Indexer, *workers: FakeWorker) -> None:
    """Returns once the index equals the workers' truth and says so."""
    await until(
        lambda: (
            all(indexer.index.held(worker.instance) == worker.truth for worker in workers)
            and not any(degraded_reasons(indexer))
        )
    )
    indexer.index.check_invariants()


async def test_a_new_indexer_takes_what_workers_hold_and_then_follows(
    nats_server: ServerProcess,
) -> None:
    async with (
        fake_worker(1, nats_server.url) as a,
        fake_worker(2, nats_server.url) as b,
        background(a.publisher.run()),
        background(b.publisher.run()),
        indexer_on(nats_server.url) as (indexer, _),
    ):
        a.store(1, 2, 3, 4)
        b.store(1, 2)
        indexer.set_workers({1: a.as_discovered, 2: b.as_discovered})
        await in_step(indexer, a, b)
        a.remove(1, 2, 3, 4)
        b.store(1, 2, 7, 8)
        await in_step(indexer, a, b)


@asynccontextmanager
async def one_worker_in_step(
    nats_url: str,
) -> AsyncIterator[tuple[FakeWorker, Indexer, LossyReceiver]]:
    """A worker that holds a block and is heard of, and no recovery of its on the way."""
    async with (
        fake_worker(1, nats_url) as worker,
        indexer_on(nats_url) as (indexer, receiver),
    ):
        await until(indexer.events_connection)
        worker.store(1, 2)
        # While it does not publish, nothing but the snapshot can bring the index in step.
        indexer.set_workers({1: worker.as_discovered})
        await in_step(indexer, worker)
        async with background(worker.publisher.run()):
            await until(lambda: receiver.has_received)
            yield worker, indexer, receiver


async def lose(receiver: LossyReceiver, change: Callable[[], None]) -> None:
    """Makes a change whose batch the indexer never gets."""
    lost = len(receiver.lost)
    receiver.is_losing = True
    change()
    await until(lambda: any(batch.events for batch in receiver.lost[lost:]))
    receiver.is_losing = False


async def test_lost_events_are_noticed_even_when_nothing_follows(
    nats_server: ServerProcess,
) -> None:
    async with one_worker_in_step(nats_server.url) as (worker, indexer, receiver):
        await lose(receiver, lambda: worker.store(3, 4))
        await in_step(indexer, worker)


def recoveries(kind: str, outcome: str) -> float:
    """Of any reason, so far in this process."""
    (family,) = metrics.recoveries.collect()
    return sum(
        sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
        and (sample.labels["kind"], sample.labels["outcome"]) == (kind, outcome)
    )


async def test_missed_batches_are_asked_for_and_no_snapshot_is_taken(
    nats_server: ServerProcess,
) -> None:
    async with one_worker_in_step(nats_server.url) as (worker, indexer, receiver):
        snapshots, taken = worker.snapshots, recoveries("batches", "taken")
        await lose(receiver, lambda: worker.store(3, 4))
        await lose(receiver, lambda: worker.remove(1, 2))
        worker.store(5, 6)
        await in_step(indexer, worker)
        # The last may still be counted when the index is in step.
        await until(lambda: worker.ranges == recoveries("batches", "taken") - taken > 0)
        assert worker.snapshots == snapshots


async def test_a_snapshot_is_taken_when_the_missed_batches_are_gone(
    nats_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_publisher, "RECENT_BYTES", 0)
    async with one_worker_in_step(nats_server.url) as (worker, indexer, receiver):
        gone, taken = recoveries("batches", "gone"), recoveries("snapshot", "taken")
        await lose(receiver, lambda: worker.store(3, 4))
        await in_step(indexer, worker)
        assert recoveries("batches", "gone") > gone
        assert recoveries("snapshot", "taken") > taken


async def test_batches_that_are_not_the_ones_asked_for_are_refused(
    nats_server: ServerProcess,
) -> None:
    async with fake_worker(1, nats_server.url) as worker:
        worker.store(1, 2)
        epoch = next(worker.publisher.snapshot()).epoch
        wanted = BatchRange(epoch, 1, 1)
        (batch,) = await fetch_batches(worker.as_discovered, wanted, timeout_seconds=5)
        assert (batch.epoch, batch.sequence_number) == (epoch, 1)
        somebody_else = replace(worker.as_discovered, instance=2)
        with pytest.raises(WorkerLost):
            await fetch_batches(somebody_else, wanted, timeout_seconds=5)


async def test_a_worker_whose_engine_restarted_is_followed_anew(
    nats_server: ServerProcess,
) -> None:
    async with (
        fake_worker(1, nats_server.url) as worker,
        indexer_on(nats_server.url) as (indexer, _),
    ):
        indexer.set_workers({1: worker.as_discovered})
        async with background(worker.publisher.run()):
            worker.store(1, 2, 3, 4)
            await in_step(indexer, worker)
        worker.restart()
        worker.store(5, 6)
        async with background(worker.publisher.run()):
            await in_step(indexer, worker)


async def test_a_nats_restart_degrades_the_index_and_then_heals(
    start_nats: Callable[[], ServerProcess],
) -> None:
    server = start_nats()
    async with (
        fake_worker(1, server.url) as worker,
        background(worker.publisher.run()),
        indexer_on(server.url) as (indexer, _),
    ):
        indexer.set_workers({1: worker.as_discovered})
        worker.store(1, 2, 3, 4)
        await in_step(indexer, worker)
        server.stop()
        await until(lambda: degraded_reasons(indexer) == ["events_disconnected"])
        worker.remove(1, 2, 3, 4)
        worker.store(5, 6)
        server.start()
        await in_step(indexer, worker)


async def test_services_may_start_before_nats(start_nats: Callable[[], ServerProcess]) -> None:
    server = start_nats()
    server.stop()
    async with (
        fake_worker(1, server.url) as worker,
        background(worker.publisher.run()),
        indexer_on(server.url) as (indexer, _),
    ):
        indexer.set_workers({1: worker.as_discovered})
        worker.store(1, 2)
        await until(lambda: indexer.index.held(1) == worker.truth)
        assert degraded_reasons(indexer) == ["events_disconnected"]
        worker.store(3, 4)
        server.start()
        await in_step(indexer, worker)


async def test_a_worker_that_can_not_be_asked_is_degraded_until_it_can(
    nats_server: ServerProcess,
) -> None:
    async with (
        indexer_on(nats_server.url) as (indexer, _),
        fake_worker(1, nats_server.url) as worker,
        fake_worker(2, nats_server.url) as somebody_else,
    ):
        worker.store(1, 2)
        wrong = Worker(1, somebody_else.address, MODEL, BLOCK_SIZE_TOKENS)
        indexer.set_workers({1: wrong})
        await until(lambda: somebody_else.snapshots > 1)
        await until(lambda: degraded_reasons(indexer) == ["discovered"])
        assert indexer.index.held(1) == set()
        indexer.set_workers({1: worker.as_discovered})
        await in_step(indexer, worker)


async def test_a_worker_that_left_leaves_the_index_at_once(nats_server: ServerProcess) -> None:
    async with (
        fake_worker(1, nats_server.url) as worker,
        background(worker.publisher.run()),
        indexer_on(nats_server.url) as (indexer, _),
    ):
        indexer.set_workers({1: worker.as_discovered})
        worker.store(1, 2)
        await in_step(indexer, worker)
        indexer.set_workers({})
        assert indexer.index.blocks == 0
        assert list(indexer.statuses()) == []


def indexer_that_asks(
    fetch: Callable[[Worker], Awaitable[KvSnapshot]], *, recoveries_at_once: int
) -> Indexer:
    """One that hears no events, and gets snapshots from a function."""
    return Indexer(
        index=FastestIndex(1 << 30),
        fetch_snapshot=fetch,
        fetch_batches=partial(fetch_batches, timeout_seconds=5),
        events_connection=lambda: 1,
        silent_after_seconds=60,
        recoveries_at_once=recoveries_at_once,
    )


async def test_few_workers_are_asked_at_once() -> None:
    asked: list[int] = []
    may_answer = asyncio.Event()

    async def fetch(worker: Worker) -> KvSnapshot:
        asked.append(worker.instance)
        await may_answer.wait()
        return KvSnapshot(1, 1, [worker.instance])

    indexer = indexer_that_asks(fetch, recoveries_at_once=2)
    indexer.set_workers({i: Worker(i, "", MODEL, BLOCK_SIZE_TOKENS) for i in range(1, 6)})
    async with background(indexer.run()):
        await until(lambda: len(asked) == 2)
        may_answer.set()
        await until(lambda: indexer.index.blocks == 5)
    assert sorted(asked) == [1, 2, 3, 4, 5]


async def test_a_worker_may_leave_while_it_is_asked() -> None:
    async def fetch(worker: Worker) -> KvSnapshot:
        if worker.instance == 1:
            # In step by what it says itself; then it is gone.
            indexer.take(
                kv_events_pb2.KvEventBatch(
                    instance_id=1, model=MODEL, block_size_tokens=BLOCK_SIZE_TOKENS, epoch=1
                )
            )
            indexer.set_workers({2: Worker(2, "", MODEL, BLOCK_SIZE_TOKENS)})
        return KvSnapshot(1, 1, [worker.instance])

    indexer = indexer_that_asks(fetch, recoveries_at_once=1)
    indexer.set_workers({1: Worker(1, "", MODEL, BLOCK_SIZE_TOKENS)})
    async with background(indexer.run()):
        await until(lambda: indexer.index.blocks == 1)
    assert indexer.index.held(2) == {2}


def test_only_live_workers_that_publish_kv_events_are_followed() -> None:
    instances = [
        discovery_pb2.Instance(instance_id=number, address=f"host:{number}", name=f"w{number}")
        for number in (1, 2)
    ]
    cards = [
        discovery_pb2.ModelCard(
            instance_id=number,
            model=MODEL,
            kv_block_size_tokens=BLOCK_SIZE_TOKENS,
            publishes_kv_events=number != 2,
        )
        for number in (1, 2, 3)
    ]
    assert live_workers(instances, cards) == {
        1: Worker(1, "host:1", MODEL, BLOCK_SIZE_TOKENS, "w1")
    }


def test_of_workers_at_one_address_only_the_youngest_is_followed() -> None:
    instances = [discovery_pb2.Instance(instance_id=number, address="host:1") for number in (1, 2)]
    cards = [
        discovery_pb2.ModelCard(
            instance_id=number,
            model=MODEL,
            kv_block_size_tokens=BLOCK_SIZE_TOKENS,
            publishes_kv_events=True,
            created_unix_seconds=100 + number,
        )
        for number in (2, 1)
    ]
    assert live_workers(instances, cards).keys() == {2}


@asynccontextmanager
async def stub_of(indexer: Indexer) -> AsyncIterator[kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub]:
    async with stub_to(KvIndexerServicer(indexer)) as stub:
        yield stub


@asynccontextmanager
async def stub_to(
    servicer: KvIndexerServicer,
) -> AsyncIterator[kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub]:
    add = partial(kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server, servicer)
    async with (
        serving("127.0.0.1", 0, add, [SERVICE_NAME]) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)


def indexer_holding(**held: list[int]) -> Indexer:
    """Workers are called w1, w2, ...; nothing is heard of them."""
    index = FastestIndex(1 << 30)
    indexer = Indexer(
        index=index,
        fetch_snapshot=partial(fetch_snapshot, timeout_seconds=5),
        fetch_batches=partial(fetch_batches, timeout_seconds=5),
        events_connection=lambda: 1,
        silent_after_seconds=60,
        recoveries_at_once=1,
    )
    ids = {int(name[1:]): blocks for name, blocks in held.items()}
    indexer.set_workers({i: Worker(i, "", MODEL, BLOCK_SIZE_TOKENS, f"w{i}") for i in ids})
    for instance, blocks in ids.items():
        index.store(instance, blocks)
    return indexer


def query(*blocks: int, model: str = MODEL, size: int = BLOCK_SIZE_TOKENS) -> Message:
    return kv_indexer_pb2.OverlapQuery(model=model, block_size_tokens=size, sequence_hashes=blocks)


async def test_each_query_of_a_call_has_its_answer_in_order() -> None:
    async with stub_of(indexer_holding(w1=[1, 2, 3], w2=[1])) as stub:
        answer = await stub.FindOverlap(
            kv_indexer_pb2.FindOverlapRequest(
                queries=[query(1, 2, 3, 4), query(9), query(1, model="another"), query(1)]  # type: ignore[list-item]
            ),
            timeout=5,
        )
    overlaps = [dict(zip(o.instance_ids, o.blocks, strict=True)) for o in answer.overlaps]
    assert overlaps == [{1: 3, 2: 1}, {}, {}, {1: 1, 2: 1}]


def question(*hashes: int) -> kv_indexer_pb2.SessionRequest:
    request = kv_indexer_pb2.FindOverlapRequest(queries=[query(*hashes)])  # type: ignore[list-item]
    return kv_indexer_pb2.SessionRequest(find_overlap=request)


async def test_a_session_answers_one_question_after_the_other_until_the_indexer_stops() -> None:
    servicer = KvIndexerServicer(indexer_holding(w1=[1, 2, 3]))
    async with stub_to(servicer) as stub, asyncio.timeout(10):
        session = stub.Session()
        for hashes, blocks in (([1], 1), ([1, 2], 2), ([1, 2, 3, 4], 3)):
            await session.write(question(*hashes))
            response = await session.read()
            assert isinstance(response, kv_indexer_pb2.SessionResponse)
            assert list(response.find_overlap.overlaps[0].blocks) == [blocks]
        servicer.closing.set()
        assert await session.read() is grpc.aio.EOF
        assert await session.code() is grpc.StatusCode.OK
        refused = stub.Session()
        assert await refused.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_query_of_another_block_size_finds_nobody_and_costs_the_others_nothing() -> None:
    async with stub_of(indexer_holding(w1=[1])) as stub:
        answer = await stub.FindOverlap(
            kv_indexer_pb2.FindOverlapRequest(queries=[query(1, size=32), query(1)]),  # type: ignore[list-item]
            timeout=5,
        )
    assert [list(o.instance_ids) for o in answer.overlaps] == [[], [1]]


async def test_the_status_names_workers_and_why_they_are_degraded() -> None:
    async with stub_of(indexer_holding(w1=[1, 2])) as stub:
        answer = await stub.GetStatus(kv_indexer_pb2.GetStatusRequest(), timeout=5)
    expected = kv_indexer_pb2.WorkerStatus(
        instance_id=1, model=MODEL, blocks=2, degraded_reason="discovered", name="w1"
    )
    assert list(answer.workers) == [expected]


async def test_every_answer_says_what_is_degraded_and_of_whom() -> None:
    indexer = indexer_holding(w1=[1], w2=[1])
    request = kv_indexer_pb2.FindOverlapRequest(queries=[query(1)])  # type: ignore[list-item]
    async with stub_of(indexer) as stub:
        answer = await stub.FindOverlap(request, timeout=5)
        (degraded,) = answer.degraded_reasons
        assert (degraded.reason, sorted(degraded.instance_ids)) == ("discovered", [1, 2])
        for instance in (1, 2):
            indexer.take(
                kv_events_pb2.KvEventBatch(
                    instance_id=instance, model=MODEL, block_size_tokens=BLOCK_SIZE_TOKENS, epoch=1
                )
            )
        assert not (await stub.FindOverlap(request, timeout=5)).degraded_reasons
        indexer.events_connection = lambda: 0
        (degraded,) = (await stub.FindOverlap(request, timeout=5)).degraded_reasons
        assert (degraded.reason, list(degraded.instance_ids)) == ("events_disconnected", [])


def test_after_an_outage_a_worker_is_degraded_until_it_speaks() -> None:
    indexer = indexer_holding(w1=[], w2=[])
    beats = {
        instance: kv_events_pb2.KvEventBatch(
            instance_id=instance, model=MODEL, block_size_tokens=BLOCK_SIZE_TOKENS, epoch=1
        )
        for instance in (1, 2)
    }
    for beat in beats.values():
        indexer.take(beat)
    assert indexer.degraded_reasons() == {}
    indexer.events_connection = lambda: 0
    assert indexer.degraded_reasons() == {"events_disconnected": ()}
    indexer.events_connection = lambda: 2
    indexer.take(beats[1])
    assert indexer.degraded_reasons() == {"events_disconnected": [2]}
    assert sorted(degraded_reasons(indexer)) == ["", "events_disconnected"]
    indexer.take(beats[2])
    assert indexer.degraded_reasons() == {}


async def test_a_worker_that_fell_silent_is_degraded_until_it_speaks_and_named_in_the_log(
    nats_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer_module, "REPORT_SECONDS", 0.01)
    async with (
        fake_worker(1, nats_server.url) as worker,
        indexer_on(nats_server.url) as (indexer, _),
    ):
        await until(indexer.events_connection)
        indexer.silent_after_seconds = 0.01
        with capture_logs() as lines:
            indexer.set_workers({1: replace(worker.as_discovered, name="w1")})
            await until(lambda: indexer.degraded_reasons() == {"silent": [1]})
            await until(lambda: "worker is degraded" in events(lines))
            indexer.silent_after_seconds = 60
            async with background(worker.publisher.run()):
                await until(lambda: indexer.degraded_reasons() == {})
                await until(lambda: "worker is degraded no longer" in events(lines))
    told = [line for line in lines if "degraded" in line["event"]]
    assert [(line["worker"], line["reason"]) for line in told] == [("w1", "silent")] * 2
    assert {line["address"] for line in told} == {worker.as_discovered.address}


def events(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return [line["event"] for line in lines]


async def test_the_service_follows_workers_from_registration_to_lost_lease(
    etcd_server: ServerProcess, nats_server: ServerProcess
) -> None:
    settings = KvIndexerSettings(
        namespace=NAMESPACE, etcd_url=etcd_server.url, nats_url=nats_server.url
    )
    discovery, stop = Discovery(etcd_server.url, NAMESPACE), asyncio.Event()
    async with (
        background(serve(settings, stop)) as service,
        fake_worker(1, nats_server.url) as worker,
        background(worker.publisher.run()),
        discovery.watching("instances/kv_indexer/", discovery_pb2.Instance) as indexers,
    ):
        await until(lambda: indexers.entries)
        (address,) = (instance.address for instance in indexers.values())
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)

            async def is_indexed(blocks_by_worker: dict[int, int]) -> bool:
                status = await stub.GetStatus(kv_indexer_pb2.GetStatusRequest(), timeout=5)
                return {w.instance_id: w.blocks for w in status.workers} == blocks_by_worker

            instance = discovery_pb2.Instance(
                instance_id=1, role=discovery_pb2.ROLE_DECODE_WORKER, address=worker.address
            )
            card = discovery_pb2.ModelCard(
                instance_id=1,
                model=MODEL,
                kv_block_size_tokens=BLOCK_SIZE_TOKENS,
                publishes_kv_events=True,
            )
            worker.store(1, 2, 3, 4)
            async with discovery.registered(instance, [card]):
                await eventually(lambda: is_indexed({1: 2}))
            await eventually(lambda: is_indexed({}))
        stop.set()
        async with asyncio.timeout(WAIT_SECONDS):
            await service
        await until(lambda: not indexers.entries)
