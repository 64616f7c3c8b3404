"""Tells KV indexers what the engine's cache holds: batches over NATS, and on request once more, or
all of it as a snapshot.

NATS may be away or slow. Then batches are not kept for it: their numbers go on, so readers notice
when it is back, and ask for what they missed or for a snapshot.
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

from libs.common.errors import InvalidRequest, KvBatchesGone
from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    InstanceId,
    KvBatch,
    KvEvent,
    Tier,
    subject,
)
from libs.common.kv_messages import part_of, stored_message
from libs.engine.interface import EngineKvEvent
from libs.worker.core.kv_ledger import KvLedger
from libs.worker.core.recent_batches import RecentBatches
from libs.worker.core.tiered_ledger import TieredLedger
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.worker.v1 import worker_pb2

HEARTBEAT_SECONDS = 1.0
QUICK_HEARTBEAT_SECONDS = 0.1
QUICK_FOR_SECONDS = 1.5
"""After something was dropped, heartbeats are quick for so long, since every reader may have missed
it: longer than readers take to connect again once NATS is back."""

GATHER_SECONDS = 0.05
"""How long changes are gathered into one batch."""

PUBLISH_SECONDS = 1.0
"""How long NATS may take to accept a batch before it is dropped."""

OUTBOX_BATCHES = 64
MAX_UNSENT_BYTES = 8 << 20
"""How much the NATS client may hold that the network did not take yet."""

SNAPSHOT_MESSAGE_BLOCKS = 65_536

RECENT_BYTES = 8 << 20
"""Batches kept for readers that missed some: a million blocks or so."""

HASH_BYTES = 8
"""Of a block, in batches and snapshots."""

FEW_RECENT_BYTES = 64 << 10
"""So much is sent as batches even where a snapshot is smaller."""

RECENT_MESSAGE_BYTES = 1 << 20
"""A message of batches goes once it has that much."""

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
        has_host_tier: bool = False,
    ) -> None:
        """The client need not be connected yet."""
        self._nats = nats
        self._subject = subject(namespace, instance_id)
        self._instance_id = instance_id
        self._model = model
        self._block_size_tokens = block_size_tokens
        ledger = TieredLedger if has_host_tier else KvLedger
        self._ledger = ledger(block_size_tokens, epoch=time.time_ns())
        self._has_changes = asyncio.Event()
        self._outbox: deque[bytes] = deque(maxlen=OUTBOX_BATCHES)
        self._recent = RecentBatches(RECENT_BYTES)
        self._quick_until = 0.0
        """Of `time.monotonic`."""

    def cached_blocks(self) -> dict[Tier, int]:
        """Blocks that a request of the same prefix could reuse, by tier."""
        return self._ledger.tier_blocks()

    def evicted_blocks(self) -> dict[Tier, int]:
        """Blocks that the engine has let go of since the beginning, by tier."""
        return self._ledger.tier_evicted_blocks()

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
        for each in (BlocksStored(held.sequence_hashes, held.chains), *held.lower_tiers):
            hashes, chains = each.sequence_hashes, each.chains
            for start in range(0, max(1, len(hashes)), SNAPSHOT_MESSAGE_BLOCKS):
                part = part_of(hashes, chains, start, start + SNAPSHOT_MESSAGE_BLOCKS)
                yield worker_pb2.GetKvSnapshotResponse(
                    instance_id=self._instance_id,
                    model=self._model,
                    block_size_tokens=self._block_size_tokens,
                    epoch=held.epoch,
                    sequence_number=held.sequence_number,
                    blocks=stored_message(*part, each.tier),
                )

    def batches(
        self, epoch: int, first: int, last: int
    ) -> Iterator[worker_pb2.GetKvBatchesResponse]:
        """Batches `first` to `last` again. Raises KvBatchesGone unless all of them are here, and
        when a snapshot is smaller."""
        if not 1 <= first <= last:
            raise InvalidRequest(f"batches {first} to {last} are no range")
        found = self._recent.between(first, last) if epoch == self._ledger.epoch else None
        if found is None:
            raise KvBatchesGone(f"not all of batches {first} to {last} of epoch {epoch} are here")
        found_bytes = sum(map(len, found))
        held_bytes = HASH_BYTES * sum(self.cached_blocks().values())
        if found_bytes > max(FEW_RECENT_BYTES, held_bytes):
            raise KvBatchesGone(f"batches {first} to {last} are {found_bytes} bytes: too many")
        message = worker_pb2.GetKvBatchesResponse()
        size_bytes = 0
        for batch in found:
            message.batches.append(batch)
            size_bytes += len(batch)
            if size_bytes >= RECENT_MESSAGE_BYTES:
                yield message
                message, size_bytes = worker_pb2.GetKvBatchesResponse(), 0
        if message.batches:
            yield message

    async def run(self) -> None:
        """Publishes for ever; a heartbeat when there was nothing else for a second, or less when
        NATS was away."""
        while True:
            # A message for each engine step would cost more than the tokens of the step.
            await asyncio.sleep(GATHER_SECONDS)
            try:
                async with asyncio.timeout(self._heartbeat_seconds()):
                    await self._has_changes.wait()
            except TimeoutError:
                self._outbox.append(self._serialised(self._ledger.heartbeat()))
            self._has_changes.clear()
            self._cut()
            while self._outbox:
                if await self._publish(self._outbox[0]):
                    self._outbox.popleft()
                    _batches.labels("sent").inc()
                else:
                    _batches.labels("dropped").inc(len(self._outbox))
                    self._outbox.clear()
                    self._quick_until = time.monotonic() + QUICK_FOR_SECONDS

    def _heartbeat_seconds(self) -> float:
        is_quick = time.monotonic() < self._quick_until
        return QUICK_HEARTBEAT_SECONDS if is_quick else HEARTBEAT_SECONDS

    def _cut(self) -> None:
        for batch in self._ledger.cut():
            data = self._serialised(batch)
            self._recent.append(data)
            self._outbox.append(data)

    def _serialised(self, batch: KvBatch) -> bytes:
        return kv_events_pb2.KvEventBatch(
            instance_id=self._instance_id,
            model=self._model,
            block_size_tokens=self._block_size_tokens,
            epoch=batch.epoch,
            sequence_number=batch.sequence_number,
            events=map(_to_message, batch.events),
        ).SerializeToString()

    async def _publish(self, batch: bytes) -> bool:
        if not self._nats.is_connected or self._nats.pending_data_size > MAX_UNSENT_BYTES:
            return False
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._nats.publish(self._subject, batch)
        except (nats.errors.Error, OSError, TimeoutError):
            return False
        return True


def _to_message(event: KvEvent) -> kv_events_pb2.KvEvent:
    match event:
        case BlocksStored(hashes, chains, tier):
            return kv_events_pb2.KvEvent(stored=stored_message(hashes, chains, tier))
        case BlocksRemoved(hashes, tier):
            return kv_events_pb2.KvEvent(
                removed=kv_events_pb2.BlocksRemoved(
                    sequence_hashes=hashes, tier=kv_events_pb2.Tier.ValueType(tier)
                )
            )
        case CacheCleared():
            return kv_events_pb2.KvEvent(cleared=kv_events_pb2.CacheCleared())
        case _:
            assert_never(event)
