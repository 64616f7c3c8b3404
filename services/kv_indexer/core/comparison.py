"""Compares what the index holds of a worker with what the worker holds. No I/O, clock or logging in
here."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import assert_never

from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    KvBatch,
    SequenceHash,
    Tier,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one worker's blocks, here and there."""

    equal_blocks: int
    only_in_index: Set[SequenceHash]
    only_at_worker: Set[SequenceHash]
    """Without those that the index may lack."""
    evicted_blocks: int
    """Only at the worker, and rightly so."""


def brought_up(held: set[SequenceHash], batches: Iterable[KvBatch]) -> set[SequenceHash]:
    """What is held in device memory, the only tier that snapshots tell of, after these batches,
    which follow on what was held before."""
    for batch in batches:
        for event in batch.events:
            match event:
                case BlocksStored(hashes, tier=tier):
                    if tier is Tier.DEVICE:
                        held.update(hashes)
                case BlocksRemoved(hashes, tier=tier):
                    if tier is Tier.DEVICE:
                        held.difference_update(hashes)
                case CacheCleared():
                    held.clear()
                case _:
                    assert_never(event)
    return held


def compare(
    in_index: Set[SequenceHash], at_worker: Set[SequenceHash], *, may_lack_blocks: int
) -> Difference:
    """The two as of the same batch. The index may lack so many blocks, for want of room; when it
    lacks more, it can't be told which of them it should have, and all are named."""
    lacking = at_worker - in_index
    is_lack_allowed = len(lacking) <= may_lack_blocks
    return Difference(
        equal_blocks=len(at_worker) - len(lacking),
        only_in_index=in_index - at_worker,
        only_at_worker=frozenset() if is_lack_allowed else lacking,
        evicted_blocks=len(lacking) if is_lack_allowed else 0,
    )
