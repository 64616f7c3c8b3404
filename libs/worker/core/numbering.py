"""Numbers a cache's changes: batches that fit into messages. No I/O or clock in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from libs.common.kv_events import CacheCleared, KvBatch, KvEvent

MAX_EVENT_BLOCKS = 8_192
MAX_BATCH_BLOCKS = 8 * MAX_EVENT_BLOCKS
"""Half a MiB of hashes: NATS takes messages of up to 1 MiB unless told otherwise."""


class Numbering:
    """Batches 1, 2, 3, ... of an epoch, which must be larger than any that this worker had."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.last = 0
        """Number of the last batch."""

    def batches(self, events: Iterable[KvEvent]) -> list[KvBatch]:
        """One batch as a rule, none without events, several when one would grow too large for a
        message. No event may have more than MAX_EVENT_BLOCKS."""
        batches: list[KvBatch] = []
        gathered: list[KvEvent] = []
        blocks = 0
        for event in events:
            size = 0 if isinstance(event, CacheCleared) else len(event.sequence_hashes)
            if blocks + size > MAX_BATCH_BLOCKS:
                batches.append(self._next(gathered))
                gathered, blocks = [], 0
            gathered.append(event)
            blocks += size
        if gathered:
            batches.append(self._next(gathered))
        return batches

    def heartbeat(self) -> KvBatch:
        """Repeats the number of the last batch."""
        return KvBatch(self.epoch, self.last)

    def _next(self, events: Sequence[KvEvent]) -> KvBatch:
        self.last += 1
        return KvBatch(self.epoch, self.last, tuple(events))
