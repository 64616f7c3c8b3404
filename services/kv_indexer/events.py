"""Receives the workers' KV events from NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg

from libs.common import logs
from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    KvEvent,
    Tier,
    all_subjects,
)
from libs.common.kv_messages import chains_of, hashes_of
from libs.common.tasks import background
from switchgear.kv_events.v1 import kv_events_pb2

log = logs.get(__name__)

TIERS: dict[int, Tier] = {tier.value: tier for tier in Tier}
"""Those that are known, by their numbers in messages."""

POLL_SECONDS = 0.1
MAX_UNREAD_BATCHES = 65_536
MAX_UNREAD_BYTES = 64 << 20
"""What comes beyond these, while the process is busy, is lost, and then noticed as a gap."""


@asynccontextmanager
async def receiving(
    client: Client, namespace: str, take: Callable[[kv_events_pb2.KvEventBatch], None]
) -> AsyncIterator[None]:
    """Gives every batch to `take` while the body runs, from when NATS is reached."""

    async def on_message(message: Msg) -> None:
        try:
            batch = kv_events_pb2.KvEventBatch.FromString(message.data)
        except DecodeError:
            log.error("unreadable KV events", subject=message.subject)
            return
        take(batch)

    async def subscribe() -> None:
        # The client offers no way to wait for its first connection; later ones it handles alone.
        while not client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        await client.subscribe(
            all_subjects(namespace),
            cb=on_message,
            pending_msgs_limit=MAX_UNREAD_BATCHES,
            pending_bytes_limit=MAX_UNREAD_BYTES,
        )

    async with background(subscribe()):
        yield


def from_message(message: kv_events_pb2.KvEventBatch) -> KvBatch:
    """The batch as a value. What the index does not count (tiers and kinds from the future) is left
    as an event of no blocks, since a batch without events would be a heartbeat."""
    # Slices are made much faster than what comes of iterating.
    return KvBatch(message.epoch, message.sequence_number, tuple(map(_event, message.events[:])))


def _event(event: kv_events_pb2.KvEvent) -> KvEvent:
    kind = event.WhichOneof("event")
    if kind == "stored":
        stored = event.stored
        if (tier := TIERS.get(stored.tier)) is not None:
            return BlocksStored(hashes_of(stored), chains_of(stored), tier)
    elif kind == "removed":
        removed = event.removed
        if (tier := TIERS.get(removed.tier)) is not None:
            return BlocksRemoved(hashes_of(removed), tier)
    elif kind == "cleared":
        return CacheCleared()
    return BlocksStored(())
