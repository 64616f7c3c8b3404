"""Asks the workers whether the index is right."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from itertools import islice

from libs.common.errors import KvBatchesGone, SwitchgearError
from libs.common.kv_events import InstanceId, KvBatch, KvSnapshot, SequenceHash, Tier
from services.kv_indexer.core.comparison import (
    Difference,
    Held,
    brought_up,
    compare,
    snapshot_of,
)
from services.kv_indexer.core.follower import BatchRange
from services.kv_indexer.indexer import FollowedStatus, Indexer
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2

WORKERS_AT_ONCE = 4
MAX_EXAMPLES = 8


class Verifier:
    """Compares the index with workers' snapshots, one call after another."""

    def __init__(self, indexer: Indexer) -> None:
        self._indexer = indexer
        self._one_call = asyncio.Lock()

    async def verify(self, instances: Collection[InstanceId]) -> list[kv_indexer_pb2.Comparison]:
        """By instance id; of these workers, or of all when none is named."""
        async with self._one_call:
            followed = {status.worker.instance for status in self._indexer.statuses()}
            at_once = asyncio.Semaphore(WORKERS_AT_ONCE)

            async def one(instance: InstanceId) -> kv_indexer_pb2.Comparison:
                async with at_once:
                    return await self._compare(instance)

            wanted = sorted(set(instances) or followed)
            return list(await asyncio.gather(*map(one, wanted)))

    async def _compare(self, instance: InstanceId) -> kv_indexer_pb2.Comparison:
        """Takes what the index holds first, so that the worker is never behind it."""
        status = self._indexer.status(instance)
        if status is None:
            return kv_indexer_pb2.Comparison(
                instance_id=instance, failure="the index does not follow it"
            )
        comparison = kv_indexer_pb2.Comparison(
            instance_id=instance,
            model=status.worker.model,
            index_epoch=status.epoch,
            index_sequence_number=status.applied,
        )
        held = {tier: set(self._indexer.index.held(instance, tier)) for tier in Tier}
        try:
            snapshot = await self._indexer.fetch_snapshot(status.worker)
            comparison.worker_epoch = snapshot.epoch
            comparison.worker_sequence_number = snapshot.sequence_number
            batches = await self._batches_between(status, snapshot)
        except SwitchgearError as error:
            comparison.failure = error.message
            return comparison
        # Sets of a million take long enough to be felt by whoever waits for an answer.
        differences = await asyncio.to_thread(_differences, status, held, snapshot, batches)
        _fill(comparison, differences.pop(Tier.DEVICE))
        for tier, difference in differences.items():
            if not difference.is_of_none:
                lower = comparison.lower_tiers.add(tier=kv_events_pb2.Tier.ValueType(tier))
                _fill(lower, difference)
        return comparison

    async def _batches_between(
        self, status: FollowedStatus, snapshot: KvSnapshot
    ) -> Iterable[KvBatch]:
        """What was on its way to the index when the worker answered. Raises SwitchgearError when
        the two can't be brought to the same batch: the index is far behind then, or ahead of what
        the worker says of itself."""
        applied, numbered = status.applied, snapshot.sequence_number
        if (status.epoch, applied) == (snapshot.epoch, numbered):
            return ()
        if status.epoch != snapshot.epoch or applied > numbered:
            raise KvBatchesGone(
                f"the index is at batch {applied} of epoch {status.epoch},"
                f" the worker at batch {numbered} of epoch {snapshot.epoch}"
            )
        missing = BatchRange(status.epoch, applied + 1, numbered)
        return await self._indexer.fetch_batches(status.worker, missing)


def _differences(
    status: FollowedStatus, held: Held, snapshot: KvSnapshot, batches: Iterable[KvBatch]
) -> dict[Tier, Difference]:
    return compare(
        brought_up(held, batches), snapshot_of(snapshot), may_lack_blocks=status.evicted_blocks
    )


def _fill(
    message: kv_indexer_pb2.Comparison | kv_indexer_pb2.TierComparison, difference: Difference
) -> None:
    message.equal_blocks = difference.equal_blocks
    message.only_in_index_blocks = len(difference.only_in_index)
    message.only_at_worker_blocks = len(difference.only_at_worker)
    message.evicted_blocks = difference.evicted_blocks
    message.only_in_index_examples.extend(_examples(difference.only_in_index))
    message.only_at_worker_examples.extend(_examples(difference.only_at_worker))


def _examples(blocks: Iterable[SequenceHash]) -> list[SequenceHash]:
    return list(islice(blocks, MAX_EXAMPLES))
