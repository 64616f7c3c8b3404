"""Tells KV indexers what the engine's cache holds: batches over NATS, snapshots on request.

NATS may be away or slow. Then batches are dropped, never kept: their numbers go on, so readers
notice when it is back and take a snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import assert_never

import nats.errors
from nats.aio.client import Client
from prometheus_client import Counter

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    InstanceId,
    KvBatch,
    KvEvent,
    subject,
)
from libs.engine.interface import EngineKvEvent
from libs.worker.core.kv_ledger import KvLedger
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.worker.v1 import worker_pb2

HEARTBEAT_SECONDS = 1.0
GATHER_SECONDS = 0.05
"""How long changes are gathered into one batch."""

PUBLISH_SECONDS = 1.0
"""How long NATS may take to accept a batch before it is dropped."""

OUTBOX_BATCHES = 64
MAX_UNSENT_BYTES = 8 << 20
"""How much the NATS client may hold that the network did not take yet."""

SNAPSHOT_MESSAGE_BLOCKS = 65_536

_batches = Counter(
    "switchgear_worker_kv_batches", "KV event batches and heartbeats, sent or dropped.", ["outcome"]
)
_unhashed = Counter(
    "switchgear_worker_kv_unhashed_blocks",
    "Blocks of the engine's that could not be told to the indexers.",
)


class KvPublisher:
    """Publishes one worker's KV events. Made once for each engine start: that is an epoch."""

    def __init__(
        self,
        nats: Client,
        *,
        namespace: str,
        instance_id: InstanceId,
        model: str,
        block_size_tokens: int,
    ) -> None:
        """The client need not be connected yet."""
        self._nats = nats
        self._subject = subject(namespace, instance_id)
        self._instance_id = instance_id
        self._model = model
        self._block_size_tokens = block_size_tokens
        self._ledger = KvLedger(block_size_tokens, epoch=time.time_ns())
        self._has_changes = asyncio.Event()
        self._outbox: deque[KvBatch] = deque(maxlen=OUTBOX_BATCHES)

    def cached_blocks(self) -> int:
        """Blocks that a request of the same prefix could reuse."""
        return self._ledger.published_blocks

    def take(self, events: Sequence[EngineKvEvent]) -> None:
        """Takes the engine's changes. They leave together with what else comes within
        GATHER_SECONDS."""
        unhashed_blocks = self._ledger.unhashed_blocks
        self._ledger.apply(events)
        _unhashed.inc(self._ledger.unhashed_blocks - unhashed_blocks)
        self._has_changes.set()

    def snapshot(self) -> Iterator[worker_pb2.GetKvSnapshotResponse]:
        """All blocks held now, in messages of bounded size; at least one."""
        self._cut()
        held = self._ledger.snapshot()
        for start in range(0, max(1, len(held.sequence_hashes)), SNAPSHOT_MESSAGE_BLOCKS):
            yield worker_pb2.GetKvSnapshotResponse(
                instance_id=self._instance_id,
                model=self._model,
                block_size_tokens=self._block_size_tokens,
                epoch=held.epoch,
                sequence_number=held.sequence_number,
                blocks=kv_events_pb2.BlocksStored(
                    sequence_hashes=held.sequence_hashes[start : start + SNAPSHOT_MESSAGE_BLOCKS],
                    tier=kv_events_pb2.TIER_DEVICE,
                ),
            )

    async def run(self) -> None:
        """Publishes for ever; a heartbeat when there was nothing else for a second."""
        while True:
            # A message for each engine step would cost more than the tokens of the step.
            await asyncio.sleep(GATHER_SECONDS)
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._has_changes.wait()
            except TimeoutError:
                self._outbox.append(self._ledger.heartbeat())
            self._has_changes.clear()
            self._cut()
            while self._outbox:
                if await self._publish(self._outbox[0]):
                    self._outbox.popleft()
                    _batches.labels("sent").inc()
                else:
                    _batches.labels("dropped").inc(len(self._outbox))
                    self._outbox.clear()

    def _cut(self) -> None:
        self._outbox.extend(self._ledger.cut())

    async def _publish(self, batch: KvBatch) -> bool:
        if not self._nats.is_connected or self._nats.pending_data_size > MAX_UNSENT_BYTES:
            return False
        message = kv_events_pb2.KvEventBatch(
            instance_id=self._instance_id,
            model=self._model,
            block_size_tokens=self._block_size_tokens,
            epoch=batch.epoch,
            sequence_number=batch.sequence_number,
            events=map(_to_message, batch.events),
        )
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._nats.publish(self._subject, message.SerializeToString())
        except (nats.errors.Error, OSError, TimeoutError):
            return False
        return True


def _to_message(event: KvEvent) -> kv_events_pb2.KvEvent:
    match event:
        case BlocksStored(hashes):
            return kv_events_pb2.KvEvent(
                stored=kv_events_pb2.BlocksStored(
                    sequence_hashes=hashes, tier=kv_events_pb2.TIER_DEVICE
                )
            )
        case BlocksRemoved(hashes):
            return kv_events_pb2.KvEvent(
                removed=kv_events_pb2.BlocksRemoved(
                    sequence_hashes=hashes, tier=kv_events_pb2.TIER_DEVICE
                )
            )
        case CacheCleared():
            return kv_events_pb2.KvEvent(cleared=kv_events_pb2.CacheCleared())
        case _:
            assert_never(event)
