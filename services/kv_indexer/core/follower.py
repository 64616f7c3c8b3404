"""Keeps one worker's share of the index equal to the worker's own account, over a transport that
loses, repeats and reorders. No I/O, clock or logging in here.

Theory of operation. Within an epoch a worker numbers its batches 1, 2, 3, ... and starts with an
empty cache. The follower applies batches in that order. It knows two numbers:

    applied   the last batch that the index includes
    latest    the last batch it has heard of, from the batch itself or from a heartbeat

and is in step when they are equal. While they are not, it wants a recovery, and keeps batches that
come meanwhile. The missing batches put `applied` forward, whether they come late or are asked for;
so does a snapshot, which is what remains when the worker has them no longer. Old epochs are
ignored, a new one voids everything known, so the only worker whose state can't be told from its
batches is one not heard of from the start.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    InstanceId,
    KvBatch,
    KvEvent,
    KvSnapshot,
)
from services.kv_indexer.core.index import BlockIndex

MAX_KEPT_BLOCKS = 262_144
"""In batches that wait for those before them: 16 MiB or so for a worker, in the worst case."""


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Batches of one worker, first and last included."""

    epoch: int
    first: int
    last: int


class RecoveryReason(StrEnum):
    """Why a recovery is wanted. Values are metric labels and degraded reasons."""

    DISCOVERED = "discovered"
    """Nothing was heard of the worker yet."""
    NEW_EPOCH = "new_epoch"
    """The worker's cache restarted, and its first batches are missing."""
    GAP = "gap"
    """A batch came before the one before it."""
    HEARTBEAT = "heartbeat"
    """A heartbeat named a batch that did not come."""
    ROOM = "room"
    """The index was full and may have room now."""


INDEX_FULL = "index_full"
FOLLOWER_DEGRADED_REASONS = (
    *(reason.value for reason in RecoveryReason if reason is not RecoveryReason.ROOM),
    INDEX_FULL,
)


class Follower:
    """Follows one worker, which must be in the index as long as it is followed."""

    def __init__(self, index: BlockIndex, instance: InstanceId) -> None:
        self._index = index
        self._instance = instance
        self.epoch = 0
        """Of the worker; 0 while nothing is known of it."""
        self.applied = 0
        self._latest = 0
        self._reason = RecoveryReason.DISCOVERED
        self._kept: OrderedDict[int, KvBatch] = OrderedDict()
        """Batches after `applied` that can't be applied yet, by number, in order of arrival."""
        self._kept_blocks = 0
        self._may_have_room = False

    @property
    def is_full(self) -> bool:
        """Whether the index had no room for all of the worker's blocks."""
        return self._index.evicted_blocks(self._instance) > 0

    @property
    def wanted(self) -> RecoveryReason | None:
        """Why a recovery is wanted; None while in step with the worker."""
        if self.epoch == 0 or self.applied < self._latest:
            return self._reason
        return RecoveryReason.ROOM if self.is_full and self._may_have_room else None

    @property
    def missing_batches(self) -> int:
        """Batches heard of that the index does not include."""
        return self._latest - self.applied

    @property
    def missing(self) -> BatchRange | None:
        """Batches that would bring the follower in step, as far as it knows; None when it is, and
        when the worker can hardly have them still, since it was not followed from its start."""
        if self.applied == self._latest or self._reason is RecoveryReason.DISCOVERED:
            return None
        last = self._latest
        while last in self._kept:
            last -= 1
        return BatchRange(self.epoch, self.applied + 1, last)

    @property
    def degraded_reason(self) -> str:
        """Why the worker's share may be wrong just now; empty when in step."""
        if (wanted := self.wanted) is not None and wanted is not RecoveryReason.ROOM:
            return wanted.value
        return INDEX_FULL if self.is_full else ""

    def take_batch(self, batch: KvBatch) -> None:
        """Takes a batch or heartbeat of the worker's, whenever it comes."""
        if batch.epoch < self.epoch:
            return
        if batch.epoch > self.epoch:
            reason = RecoveryReason.NEW_EPOCH if self.epoch else RecoveryReason.DISCOVERED
            self._start_epoch(batch.epoch)
        else:
            reason = RecoveryReason.GAP if batch.events else RecoveryReason.HEARTBEAT
        if self.applied == self._latest:
            self._reason = reason
        self._latest = max(self._latest, batch.sequence_number)
        if batch.events and batch.sequence_number > self.applied:
            self._keep(batch)
            self._apply_kept()

    def take_snapshot(self, snapshot: KvSnapshot) -> None:
        """Takes a snapshot of the worker's, unless more is known already."""
        if (snapshot.epoch, snapshot.sequence_number) < (self.epoch, self.applied):
            return
        if snapshot.epoch > self.epoch:
            self._start_epoch(snapshot.epoch)
        self._index.replace(
            self._instance, snapshot.sequence_hashes, snapshot.chains, snapshot.lower_tiers
        )
        self._may_have_room = False
        self.applied = snapshot.sequence_number
        self._latest = max(self._latest, snapshot.sequence_number)
        for number in [number for number in self._kept if number <= self.applied]:
            self._drop_kept(number)
        self._apply_kept()

    def room_was_made(self) -> None:
        """Another worker has left the index: what had no room may have it now."""
        self._may_have_room = True

    def _start_epoch(self, epoch: int) -> None:
        self._clear()
        self._kept.clear()
        self._kept_blocks = 0
        self.epoch = epoch
        self.applied = self._latest = 0

    def _keep(self, batch: KvBatch) -> None:
        self._drop_kept(batch.sequence_number)
        self._kept[batch.sequence_number] = batch
        self._kept_blocks += _weight_blocks(batch)
        # The batch longest here is the likeliest to be in the snapshot that is on its way.
        while self._kept_blocks > MAX_KEPT_BLOCKS and len(self._kept) > 1:
            self._drop_kept(next(iter(self._kept)))

    def _drop_kept(self, number: int) -> KvBatch | None:
        batch = self._kept.pop(number, None)
        if batch is not None:
            self._kept_blocks -= _weight_blocks(batch)
        return batch

    def _apply_kept(self) -> None:
        while (batch := self._drop_kept(self.applied + 1)) is not None:
            for event in batch.events:
                self._apply(event)
            self.applied += 1

    def _apply(self, event: KvEvent) -> None:
        # Attributes in patterns would take twice as long.
        match event:
            case BlocksStored():
                stored = event.sequence_hashes, event.chains, event.tier
                self._index.store(self._instance, *stored)
            case BlocksRemoved():
                self._index.discard(self._instance, event.sequence_hashes, event.tier)
            case CacheCleared():
                self._clear()
            case _:
                assert_never(event)

    def _clear(self) -> None:
        self._index.clear(self._instance)
        self._may_have_room = False

    def check_invariants(self) -> None:
        """For tests: raises AssertionError when what is kept contradicts itself."""
        assert self.applied <= self._latest
        assert all(self.applied + 1 < number <= self._latest for number in self._kept)
        assert self._kept_blocks == sum(map(_weight_blocks, self._kept.values()))


def _weight_blocks(batch: KvBatch) -> int:
    """What a batch counts for: its blocks, and something for each event itself."""
    return sum(
        1 if isinstance(event, CacheCleared) else 1 + len(event.sequence_hashes)
        for event in batch.events
    )
