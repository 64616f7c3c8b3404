"""Follows all live workers: joins discovery, KV events and snapshots around the index."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from libs.common import logs
from libs.common.errors import SwitchgearError
from libs.common.kv_events import InstanceId, KvSnapshot
from services.kv_indexer import metrics
from services.kv_indexer.core.follower import FOLLOWER_DEGRADED_REASONS, Follower
from services.kv_indexer.core.index import BlockIndex
from services.kv_indexer.events import from_message
from services.kv_indexer.snapshots import Worker
from switchgear.kv_events.v1 import kv_events_pb2

log = logs.get(__name__)

FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 5.0
REPORT_SECONDS = 1.0

EVENTS_DISCONNECTED = "events_disconnected"
SILENT = "silent"
DEGRADED_REASONS = (*FOLLOWER_DEGRADED_REASONS, EVENTS_DISCONNECTED, SILENT)

FetchSnapshot = Callable[[Worker], Awaitable[KvSnapshot]]
"""Raises SwitchgearError."""


@dataclass(slots=True)
class _Followed:
    """A live worker and how far we are with it."""

    worker: Worker
    follower: Follower
    heard_at: float
    """Of `time.monotonic`: when its last batch or heartbeat came, or when it was discovered."""
    is_queued: bool = False
    """Whether it waits for a snapshot, or for the time to ask again."""
    retry_seconds: float = FIRST_RETRY_SECONDS


@dataclass(frozen=True, slots=True)
class FollowedStatus:
    """One worker as the index sees it."""

    worker: Worker
    epoch: int
    applied: int
    held_blocks: int
    degraded_reason: str
    """Empty when its blocks follow the worker."""


@dataclass(slots=True)
class Indexer:
    """Keeps the index equal to what the workers hold, as far as it can be known."""

    index: BlockIndex
    fetch_snapshot: FetchSnapshot
    are_events_connected: Callable[[], bool]
    silent_after_seconds: float
    snapshots_at_once: int
    _followed: dict[InstanceId, _Followed] = field(default_factory=dict, init=False)
    _wanting: asyncio.Queue[_Followed] = field(default_factory=asyncio.Queue, init=False)
    """Each worker once at most."""

    def set_workers(self, workers: Mapping[InstanceId, Worker]) -> None:
        """Follows these workers from now on and forgets all others at once."""
        gone = [
            instance
            for instance, followed in self._followed.items()
            if workers.get(instance) != followed.worker
        ]
        for instance in gone:
            del self._followed[instance]
            self.index.remove(instance)
            log.info("worker left", instance=f"{instance:016x}")
        if gone:
            for followed in self._followed.values():
                followed.follower.room_was_made()
                self._ask_if_wanted(followed)
        for instance, worker in workers.items():
            if instance not in self._followed:
                self.index.add(instance, worker.model, worker.block_size_tokens)
                followed = _Followed(
                    worker, Follower(self.index, instance), heard_at=time.monotonic()
                )
                self._followed[instance] = followed
                log.info("worker discovered", instance=f"{instance:016x}", model=worker.model)
                self._ask_if_wanted(followed)

    def take(self, message: kv_events_pb2.KvEventBatch) -> None:
        """Takes one worker's KV events. A worker that is not discovered yet is not followed: its
        first snapshot will have what it says now."""
        followed = self._followed.get(message.instance_id)
        if followed is None or (message.model, message.block_size_tokens) != (
            followed.worker.model,
            followed.worker.block_size_tokens,
        ):
            metrics.foreign_batches.inc()
            return
        followed.heard_at = time.monotonic()
        followed.follower.take_batch(from_message(message))
        metrics.batches.inc()
        self._ask_if_wanted(followed)

    def statuses(self) -> Iterator[FollowedStatus]:
        """Every live worker, in no order."""
        is_connected = self.are_events_connected()
        now = time.monotonic()
        for instance, followed in self._followed.items():
            if not is_connected:
                reason = EVENTS_DISCONNECTED
            elif not (reason := followed.follower.degraded_reason):
                is_silent = now - followed.heard_at > self.silent_after_seconds
                reason = SILENT if is_silent else ""
            yield FollowedStatus(
                followed.worker,
                followed.follower.epoch,
                followed.follower.applied,
                self.index.held_blocks(instance),
                reason,
            )

    async def run(self) -> None:
        """Asks for the snapshots that are wanted, and reports to Prometheus. Never returns."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.snapshots_at_once):
                tasks.create_task(self._take_snapshots())
            tasks.create_task(self._report())

    def _ask_if_wanted(self, followed: _Followed) -> None:
        if not followed.is_queued and followed.follower.wanted is not None:
            followed.is_queued = True
            self._wanting.put_nowait(followed)

    async def _take_snapshots(self) -> None:
        while True:
            followed = await self._wanting.get()
            reason = followed.follower.wanted
            if reason is None or not self._is_current(followed):
                followed.is_queued = False
                continue
            worker = followed.worker
            try:
                snapshot = await self.fetch_snapshot(worker)
            except SwitchgearError as error:
                metrics.snapshots.labels(reason.value, "failed").inc()
                log.warning("no snapshot", instance=f"{worker.instance:016x}", error=str(error))
            else:
                metrics.snapshots.labels(reason.value, "taken").inc()
                if self._is_current(followed):
                    followed.follower.take_snapshot(snapshot)
            self._ask_again_later(followed)

    def _ask_again_later(self, followed: _Followed) -> None:
        """The next snapshot of a worker waits a little, and longer each time while still in need
        of one, so that no worker is asked all the time."""
        if followed.follower.wanted is None:
            followed.retry_seconds = FIRST_RETRY_SECONDS

        def ask() -> None:
            followed.is_queued = False
            self._ask_if_wanted(followed)

        asyncio.get_running_loop().call_later(followed.retry_seconds, ask)
        followed.retry_seconds = min(2 * followed.retry_seconds, MAX_RETRY_SECONDS)

    def _is_current(self, followed: _Followed) -> bool:
        return self._followed.get(followed.worker.instance) is followed

    async def _report(self) -> None:
        while True:
            statuses = list(self.statuses())
            metrics.blocks.set(self.index.blocks)
            metrics.workers.set(len(statuses))
            reasons = Counter(status.degraded_reason for status in statuses)
            for reason in DEGRADED_REASONS:
                metrics.degraded.labels(reason).set(reasons[reason])
            await asyncio.sleep(REPORT_SECONDS)
