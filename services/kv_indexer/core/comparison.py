"""Compares what the index holds of a worker with what the worker holds. No I/O, clock or logging in
here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import assert_never

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    KvSnapshot,
    SequenceHash,
    Tier,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one worker's blocks in one tier, here and there."""

    equal_blocks: int
    only_in_index: Set[SequenceHash]
    only_at_worker: Set[SequenceHash]
    """Without those that the index may lack."""
    evicted_blocks: int
    """Only at the worker, and rightly so."""

    @property
    def is_of_none(self) -> bool:
        """Whether there are no blocks in the tier, here or there."""
        return not (
            self.equal_blocks or self.only_in_index or self.only_at_worker or self.evicted_blocks
        )


Held = dict[Tier, set[SequenceHash]]
"""One worker's blocks by tier, all tiers named."""


def brought_up(held: Held, batches: Iterable[KvBatch]) -> Held:
    """What is held after these batches, which follow on what was held before."""
    for batch in batches:
        for event in batch.events:
            match event:
                case BlocksStored(hashes, tier=tier):
                    held[tier].update(hashes)
                case BlocksRemoved(hashes, tier=tier):
                    held[tier].difference_update(hashes)
                case CacheCleared():
                    for blocks in held.values():
                        blocks.clear()
                case _:
                    assert_never(event)
    return held


def snapshot_of(snapshot: KvSnapshot) -> Held:
    """What the worker says it holds."""
    held: Held = {tier: set() for tier in Tier}
    held[Tier.DEVICE].update(snapshot.sequence_hashes)
    for lower in snapshot.lower_tiers:
        held[lower.tier].update(lower.sequence_hashes)
    return held


def compare(
    in_index: Mapping[Tier, Set[SequenceHash]],
    at_worker: Mapping[Tier, Set[SequenceHash]],
    *,
    may_lack_blocks: int,
) -> dict[Tier, Difference]:
    """The two as of the same batch, tier by tier. The index may lack so many blocks, each counted
    once for each tier, for want of room; when it lacks more, it can't be told which of them it
    should have, and all are named."""
    lacking = {tier: at_worker[tier] - in_index[tier] for tier in Tier}
    is_lack_allowed = sum(map(len, lacking.values())) <= may_lack_blocks
    return {
        tier: Difference(
            equal_blocks=len(at_worker[tier]) - len(lacks),
            only_in_index=in_index[tier] - at_worker[tier],
            only_at_worker=frozenset() if is_lack_allowed else lacks,
            evicted_blocks=len(lacks) if is_lack_allowed else 0,
        )
        for tier, lacks in lacking.items()
    }
