"""Publishing KV events on a real NATS server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from prometheus_client import REGISTRY

from libs.common.errors import InvalidRequest, KvBatchesGone
from libs.common.hashing import sequence_hashes
from libs.common.kv_events import Tier, all_subjects, subject
from libs.common.nats_client import connecting
from libs.common.tasks import background
from libs.engine.interface import EngineBlocksStored, EngineHash
from libs.worker import kv_publisher
from libs.worker.kv_publisher import KvPublisher
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.worker.v1 import worker_pb2
from tests.fixtures.eventually import until
from tests.fixtures.servers import ServerProcess

INSTANCE, BLOCK_SIZE_TOKENS = 0xABC, 2


def stored(*tokens: int) -> EngineBlocksStored:
    """Blocks at the start of a prompt."""
    hashes = sequence_hashes(tokens, BLOCK_SIZE_TOKENS)
    return EngineBlocksStored(tuple(EngineHash(h.to_bytes(8)) for h in hashes), None, tokens)


def publisher_on(nats: Client) -> KvPublisher:
    return KvPublisher(
        nats,
        namespace="test",
        instance_id=INSTANCE,
        model="m",
        block_size_tokens=BLOCK_SIZE_TOKENS,
    )


@asynccontextmanager
async def subscriber(url: str) -> AsyncIterator[list[kv_events_pb2.KvEventBatch]]:
    """What arrives at a subscriber, in order."""
    batches: list[kv_events_pb2.KvEventBatch] = []
    async with connecting(url, "subscriber") as nats:
        await until(lambda: nats.is_connected)
        is_subscribed = asyncio.Event()

        async def read(message: Msg) -> None:
            if message.data:
                batches.append(kv_events_pb2.KvEventBatch.FromString(message.data))
            else:
                is_subscribed.set()

        await nats.subscribe(all_subjects("test"), cb=read)
        # What comes back was sent after the subscription, which is in place then.
        await nats.publish(subject("test", 0))
        await is_subscribed.wait()
        yield batches


async def test_changes_of_one_turn_leave_in_one_batch(nats_server: ServerProcess) -> None:
    async with (
        subscriber(nats_server.url) as batches,
        connecting(nats_server.url, "worker") as nats,
    ):
        await until(lambda: nats.is_connected)
        publisher = publisher_on(nats)
        async with background(publisher.run()):
            publisher.take([stored(1, 2)])
            publisher.take([stored(1, 2, 3, 4)])
            await until(lambda: batches)
            publisher.take([stored(5, 6)])
            await until(lambda: len(batches) > 1)
    first, second = batches[:2]
    assert (first.instance_id, first.model, first.block_size_tokens) == (INSTANCE, "m", 2)
    assert first.events[0].stored.sequence_hashes == sequence_hashes([1, 2, 3, 4], 2)
    assert (first.sequence_number, second.sequence_number) == (1, 2)
    assert first.epoch == second.epoch > 0


async def test_a_quiet_worker_repeats_its_last_number(
    nats_server: ServerProcess,
) -> None:
    async with (
        subscriber(nats_server.url) as batches,
        connecting(nats_server.url, "worker") as nats,
    ):
        await until(lambda: nats.is_connected)
        publisher = publisher_on(nats)
        publisher.take([stored(1, 2)])
        async with background(publisher.run()):
            await until(lambda: len(batches) > 1)
    assert [(batch.sequence_number, len(batch.events)) for batch in batches[:2]] == [(1, 1), (1, 0)]


def dropped_batches() -> float:
    labels = {"outcome": "dropped"}
    return REGISTRY.get_sample_value("switchgear_worker_kv_batches_total", labels) or 0.0


async def test_what_is_lost_while_nats_is_away_shows_in_the_numbers(
    start_nats: Callable[[], ServerProcess],
) -> None:
    server = start_nats()
    server.stop()
    dropped = dropped_batches()
    async with connecting(server.url, "worker") as nats:
        publisher = publisher_on(nats)
        async with background(publisher.run()):
            publisher.take([stored(1, 2)])
            publisher.take([stored(3, 4)])
            # The snapshot numbers what was not published yet.
            assert next(publisher.snapshot()).sequence_number == 1
            await until(lambda: dropped_batches() > dropped)
            server.start()
            await until(lambda: nats.is_connected)
            async with subscriber(server.url) as batches:
                publisher.take([stored(5, 6)])
                await until(lambda: any(batch.events for batch in batches))
    assert next(batch.sequence_number for batch in batches if batch.events) == 2


async def test_after_an_outage_the_last_number_is_told_without_waiting_for_the_next_heartbeat(
    start_nats: Callable[[], ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_publisher, "HEARTBEAT_SECONDS", 3_600.0)
    server = start_nats()
    server.stop()
    dropped = dropped_batches()
    async with connecting(server.url, "worker") as nats:
        publisher = publisher_on(nats)
        async with background(publisher.run()):
            publisher.take([stored(1, 2)])
            await until(lambda: dropped_batches() > dropped)
            server.start()
            async with subscriber(server.url) as batches:
                await until(lambda: batches)
    assert (batches[0].sequence_number, len(batches[0].events)) == (1, 0)


async def test_a_snapshot_comes_in_pieces_that_agree_on_their_number() -> None:
    publisher = publisher_on(Client())
    tokens = range(2 * (kv_publisher.SNAPSHOT_MESSAGE_BLOCKS + 1))
    publisher.take([stored(*tokens)])
    first, second = publisher.snapshot()
    assert [*first.blocks.sequence_hashes, *second.blocks.sequence_hashes] == sequence_hashes(
        tokens, BLOCK_SIZE_TOKENS
    )
    assert (first.epoch, first.sequence_number) == (second.epoch, second.sequence_number)
    assert publisher.cached_blocks() == {Tier.DEVICE: kv_publisher.SNAPSHOT_MESSAGE_BLOCKS + 1}


async def test_an_empty_cache_is_one_empty_piece() -> None:
    (only,) = publisher_on(Client()).snapshot()
    assert (only.instance_id, only.sequence_number) == (INSTANCE, 0)
    assert not only.blocks.sequence_hashes


def numbered(publisher: KvPublisher, *tokens: int) -> worker_pb2.GetKvSnapshotResponse:
    """Stores a block in a batch of its own; the snapshot numbers it."""
    publisher.take([stored(*tokens)])
    return next(publisher.snapshot())


async def test_batches_can_be_had_again_as_they_were_published(nats_server: ServerProcess) -> None:
    async with (
        subscriber(nats_server.url) as batches,
        connecting(nats_server.url, "worker") as nats,
    ):
        await until(lambda: nats.is_connected)
        publisher = publisher_on(nats)
        numbered(publisher, 1, 2)
        numbered(publisher, 3, 4)
        async with background(publisher.run()):
            await until(lambda: len(batches) >= 2)
    again = [data for piece in publisher.batches(batches[0].epoch, 1, 2) for data in piece.batches]
    assert [kv_events_pb2.KvEventBatch.FromString(data) for data in again] == batches[:2]


async def test_batches_of_another_epoch_or_not_numbered_yet_are_refused() -> None:
    publisher = publisher_on(Client())
    epoch = numbered(publisher, 1, 2).epoch
    for of_epoch, first, last in ((epoch - 1, 1, 1), (epoch, 1, 2)):
        with pytest.raises(KvBatchesGone):
            list(publisher.batches(of_epoch, first, last))
    for first, last in ((0, 1), (2, 1)):
        with pytest.raises(InvalidRequest):
            list(publisher.batches(epoch, first, last))


async def test_batches_larger_than_a_snapshot_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publisher = publisher_on(Client())
    epoch = numbered(publisher, 1, 2).epoch
    numbered(publisher, 3, 4)
    assert list(publisher.batches(epoch, 1, 2))
    # Each holds one block, and says more besides.
    monkeypatch.setattr(kv_publisher, "FEW_RECENT_BYTES", 0)
    with pytest.raises(KvBatchesGone, match="too many"):
        list(publisher.batches(epoch, 1, 2))


async def test_many_batches_come_in_messages_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_publisher, "RECENT_MESSAGE_BYTES", 1)
    publisher = publisher_on(Client())
    for number in range(3):
        epoch = numbered(publisher, number, number).epoch
    assert [len(piece.batches) for piece in publisher.batches(epoch, 1, 3)] == [1, 1, 1]
