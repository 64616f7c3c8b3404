"""KV events as values: what a worker says about its cache. See protos/switchgear/kv_events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

InstanceId = int
"""64 bits, see switchgear.discovery.v1.Instance."""

SequenceHash = int
"""64 bits, names a block and all before it. See libs.common.hashing."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks that can be reused from now on, none before the one it follows."""

    sequence_hashes: Sequence[SequenceHash]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks that are gone, none before those that follow it."""

    sequence_hashes: Sequence[SequenceHash]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """All blocks are gone."""


KvEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class KvBatch:
    """Changes in order, numbered 1, 2, 3, ... within an epoch.

    Without events it is a heartbeat, and the number is that of the last batch that had some.
    """

    epoch: int
    sequence_number: int
    events: Sequence[KvEvent] = ()


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All blocks held, as of a batch. No block comes before the one it follows."""

    epoch: int
    sequence_number: int
    sequence_hashes: Sequence[SequenceHash]


def subject(namespace: str, instance_id: InstanceId) -> str:
    """The NATS subject of one worker's batches."""
    return f"switchgear.v1.{namespace}.kv_events.{instance_id:016x}"


def all_subjects(namespace: str) -> str:
    """A NATS wildcard for the batches of every worker."""
    return f"switchgear.v1.{namespace}.kv_events.>"
