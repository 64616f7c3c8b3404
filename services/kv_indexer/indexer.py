"""Follows all live workers: joins discovery, KV events and recoveries around the index."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from libs.common import logs, tracing
from libs.common.errors import KvBatchesGone, SwitchgearError
from libs.common.kv_events import InstanceId, KvBatch, KvSnapshot
from libs.common.tracing import Kind, Span
from services.kv_indexer import metrics
from services.kv_indexer.core.follower import (
    FOLLOWER_DEGRADED_REASONS,
    BatchRange,
    Follower,
    RecoveryReason,
)
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

FetchBatches = Callable[[Worker, BatchRange], Awaitable[Sequence[KvBatch]]]
"""Raises SwitchgearError; KvBatchesGone when only a snapshot will do."""


@dataclass(slots=True)
class _Followed:
    """A live worker and how far we are with it."""

    worker: Worker
    follower: Follower
    heard_at: float
    """Of `time.monotonic`: when its last batch or heartbeat came, or when it was discovered."""
    heard_on: int
    """The connection to NATS by which that came."""
    is_queued: bool = False
    """Whether it waits for a recovery, or for the time to ask again."""
    retry_seconds: float = FIRST_RETRY_SECONDS
    degraded_reason: str = ""
    degraded_at: float = 0.0
    """Of `time.monotonic`: since when it has been degraded, if it is."""
    told_reason: str = ""
    """That the log says it is degraded for."""


@dataclass(frozen=True, slots=True)
class FollowedStatus:
    """One worker as the index sees it."""

    worker: Worker
    epoch: int
    applied: int
    missing_batches: int
    held_blocks: int
    evicted_blocks: int
    """Blocks of its that the index lacks for want of room."""
    degraded_reason: str
    """Empty when its blocks follow the worker."""


@dataclass(slots=True)
class Indexer:
    """Keeps the index equal to what the workers hold, as far as it can be known."""

    index: BlockIndex
    fetch_snapshot: FetchSnapshot
    fetch_batches: FetchBatches
    events_connection: Callable[[], int]
    """Tells the connections to NATS apart, by numbers from 1 on; 0 while there is none."""
    silent_after_seconds: float
    recoveries_at_once: int
    _followed: dict[InstanceId, _Followed] = field(default_factory=dict, init=False)
    _degraded: dict[str, list[InstanceId]] | None = field(default=None, init=False)
    """Degraded workers by reason; None when it has to be put together anew."""
    _connection: int = field(default=0, init=False)
    """The last one that there was."""
    _wanting: asyncio.Queue[_Followed] = field(default_factory=asyncio.Queue, init=False)
    """Each worker once at most."""

    def set_workers(self, workers: Mapping[InstanceId, Worker]) -> None:
        """Follows these workers from now on and forgets all others at once."""
        self._look_at_connection()
        gone = [
            instance
            for instance, followed in self._followed.items()
            if workers.get(instance) != followed.worker
        ]
        for instance in gone:
            left = self._followed.pop(instance)
            self._degraded = None
            self.index.remove(instance)
            log.info("worker left", **left.worker.log_fields)
        if gone:
            for followed in self._followed.values():
                followed.follower.room_was_made()
                self._changed(followed)
        for instance, worker in workers.items():
            if instance not in self._followed:
                self.index.add(instance, worker.model, worker.block_size_tokens)
                followed = _Followed(
                    worker,
                    Follower(self.index, instance),
                    heard_at=time.monotonic(),
                    heard_on=self._connection,
                )
                self._followed[instance] = followed
                log.info("worker discovered", **worker.log_fields, model=worker.model)
                self._changed(followed)

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
        self._look_at_connection()
        followed.heard_at, followed.heard_on = time.monotonic(), self._connection
        followed.follower.take_batch(from_message(message))
        metrics.batches.inc()
        self._changed(followed)

    def degraded_reasons(self) -> Mapping[str, Sequence[InstanceId]]:
        """Why answers may be wrong just now, and which workers it is about; none named means all.
        Cheap enough for every answer."""
        if not self._look_at_connection():
            return {EVENTS_DISCONNECTED: ()}
        if self._degraded is None:
            self._degraded = {}
            for instance, followed in self._followed.items():
                if followed.degraded_reason:
                    self._degraded.setdefault(followed.degraded_reason, []).append(instance)
        return self._degraded

    def statuses(self) -> Iterator[FollowedStatus]:
        """Every live worker, in no order."""
        return map(self._status, self._followed.values())

    def status(self, instance: InstanceId) -> FollowedStatus | None:
        """One worker; None when it is not followed."""
        followed = self._followed.get(instance)
        return None if followed is None else self._status(followed)

    async def run(self) -> None:
        """Recovers what is wanted, and reports to Prometheus. Never returns."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.recoveries_at_once):
                tasks.create_task(self._recover_wanting())
            tasks.create_task(self._report())

    def _status(self, followed: _Followed) -> FollowedStatus:
        worker, follower = followed.worker, followed.follower
        is_connected = self._look_at_connection()
        return FollowedStatus(
            worker=worker,
            epoch=follower.epoch,
            applied=follower.applied,
            missing_batches=follower.missing_batches,
            held_blocks=self.index.held_blocks(worker.instance),
            evicted_blocks=self.index.evicted_blocks(worker.instance),
            degraded_reason=followed.degraded_reason if is_connected else EVENTS_DISCONNECTED,
        )

    def _changed(self, followed: _Followed) -> None:
        self._ask_if_wanted(followed)
        self._note_degraded(followed, self._reason_of(followed))

    def _look_at_connection(self) -> bool:
        """Whether there is one. When it is a new one, anything may have been said meanwhile: all
        workers are degraded until they speak."""
        connection = self.events_connection()
        if connection not in (0, self._connection):
            self._connection = connection
            for followed in self._followed.values():
                self._note_degraded(followed, self._reason_of(followed))
        return connection != 0

    def _reason_of(self, followed: _Followed) -> str:
        if reason := followed.follower.degraded_reason:
            return reason
        return EVENTS_DISCONNECTED if followed.heard_on != self._connection else ""

    def _note_degraded(self, followed: _Followed, reason: str) -> None:
        if reason == followed.degraded_reason:
            return
        if not followed.degraded_reason:
            followed.degraded_at = time.monotonic()
        followed.degraded_reason = reason
        self._degraded = None

    def _ask_if_wanted(self, followed: _Followed) -> None:
        if not followed.is_queued and self._wanted(followed) is not None:
            followed.is_queued = True
            self._wanting.put_nowait(followed)

    async def _recover_wanting(self) -> None:
        while True:
            followed = await self._wanting.get()
            reason = self._wanted(followed)
            if reason is None:
                followed.is_queued = False
                continue
            trace = tracing.begin_own("recover")
            if not await self._recover_by_batches(followed, reason, trace):
                await self._recover_by_snapshot(followed, reason, trace)
            if trace is not None:
                trace.end(
                    {
                        "switchgear.instance_id": f"{followed.worker.instance:016x}",
                        "switchgear.reason": reason.value,
                        "switchgear.is_in_step": self._wanted(followed) is None,
                    }
                )
            self._ask_again_later(followed)

    async def _recover_by_batches(
        self, followed: _Followed, reason: RecoveryReason, trace: Span | None
    ) -> bool:
        """Asks for what is missing. False when that did not bring the index forward."""
        missing, applied = followed.follower.missing, followed.follower.applied
        if missing is None:
            return False
        with _counted("batches", reason, followed.worker, trace):
            for batch in await self.fetch_batches(followed.worker, missing):
                if self._is_current(followed):
                    followed.follower.take_batch(batch)
                    self._changed(followed)
                # They may be many: answers go between.
                await asyncio.sleep(0)
        return followed.follower.applied > applied or self._wanted(followed) is None

    async def _recover_by_snapshot(
        self, followed: _Followed, reason: RecoveryReason, trace: Span | None
    ) -> None:
        with _counted("snapshot", reason, followed.worker, trace):
            snapshot = await self.fetch_snapshot(followed.worker)
            if self._is_current(followed):
                followed.follower.take_snapshot(snapshot)
                self._changed(followed)

    def _ask_again_later(self, followed: _Followed) -> None:
        """The next recovery of a worker waits a little, and longer each time while still in need
        of one, so that no worker is asked all the time."""
        if self._wanted(followed) is None:
            followed.retry_seconds = FIRST_RETRY_SECONDS

        def ask() -> None:
            followed.is_queued = False
            self._ask_if_wanted(followed)

        asyncio.get_running_loop().call_later(followed.retry_seconds, ask)
        followed.retry_seconds = min(2 * followed.retry_seconds, MAX_RETRY_SECONDS)

    def _wanted(self, followed: _Followed) -> RecoveryReason | None:
        """Why a recovery is wanted; None for a worker that has left, too."""
        return followed.follower.wanted if self._is_current(followed) else None

    def _is_current(self, followed: _Followed) -> bool:
        return self._followed.get(followed.worker.instance) is followed

    async def _report(self) -> None:
        while True:
            now = time.monotonic()
            for followed in self._followed.values():
                if not followed.degraded_reason and (
                    now - followed.heard_at > self.silent_after_seconds
                ):
                    self._note_degraded(followed, SILENT)
                _tell(followed, now)
            statuses = list(self.statuses())
            metrics.blocks.set(self.index.blocks)
            metrics.workers.set(len(statuses))
            reasons = Counter(status.degraded_reason for status in statuses)
            for reason in DEGRADED_REASONS:
                metrics.degraded.labels(reason).set(reasons[reason])
            metrics.lag_batches.set(sum(status.missing_batches for status in statuses))
            metrics.lag_seconds.set(
                max(
                    (
                        now - followed.degraded_at
                        for followed in self._followed.values()
                        if followed.degraded_reason
                    ),
                    default=0.0,
                )
            )
            await asyncio.sleep(REPORT_SECONDS)


def _tell(followed: _Followed, now: float) -> None:
    """Logs that a worker has been degraded for longer than it takes to follow it again, and when
    that is over."""
    lasts = now - followed.degraded_at >= REPORT_SECONDS
    reason = followed.degraded_reason if lasts else ""
    if reason == followed.told_reason:
        return
    if reason:
        log.warning("worker is degraded", **followed.worker.log_fields, reason=reason)
    else:
        before = followed.told_reason
        log.info("worker is degraded no longer", **followed.worker.log_fields, reason=before)
    followed.told_reason = reason


@contextmanager
def _counted(
    kind: str, reason: RecoveryReason, worker: Worker, trace: Span | None
) -> Iterator[None]:
    """Counts, times and traces what is asked of a worker in the body. Its failure is logged and
    ends here: the worker is asked again."""
    started_at = time.monotonic()
    span = None if trace is None else trace.child(f"take {kind}", Kind.CLIENT)
    failure = ""
    try:
        yield
    except KvBatchesGone as error:
        outcome, failure = "gone", error.reason
        log.info("missed batches are gone", **worker.log_fields, error=str(error))
    except SwitchgearError as error:
        outcome, failure = "failed", error.reason
        log.warning("no recovery", kind=kind, **worker.log_fields, error=str(error))
    else:
        outcome = "taken"
        metrics.recovery_seconds.labels(kind).observe(time.monotonic() - started_at)
    metrics.recoveries.labels(kind, reason.value, outcome).inc()
    if span is not None:
        span.end(error=failure)
