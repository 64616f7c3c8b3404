"""KV events as values: what a worker says about its cache. See protos/switchgear/kv_events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

InstanceId = int
"""64 bits, see switchgear.discovery.v1.Instance."""

SequenceHash = int
"""64 bits, names a block and all before it. See libs.common.hashing."""


ChainStart = tuple[int, SequenceHash | None]
"""A position in a list of blocks, and the block that the one there follows: None when it starts a
prompt. Each block from there on follows the one before it in the list, up to the next start."""


class Tier(IntEnum):
    """Where blocks are kept, fastest first. As in switchgear.kv_events.v1.Tier."""

    DEVICE = 1
    HOST = 2
    DISK = 3


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks that can be reused from now on, none before the one it follows."""

    sequence_hashes: Sequence[SequenceHash]
    chains: Sequence[ChainStart] = ()
    """By position. A list that doesn't begin with a start begins with a prompt's first block."""
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks that are gone, none before those that follow it."""

    sequence_hashes: Sequence[SequenceHash]
    tier: Tier = Tier.DEVICE


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
    chains: Sequence[ChainStart] = ()
    """As in BlocksStored."""
    lower_tiers: Sequence[BlocksStored] = ()
    """What is held in other tiers than the fastest, which those above are of; after them, since
    blocks here may follow one of those."""


def subject(namespace: str, instance_id: InstanceId) -> str:
    """The NATS subject of one worker's batches."""
    return f"switchgear.v1.{namespace}.kv_events.{instance_id:016x}"


def all_subjects(namespace: str) -> str:
    """A NATS wildcard for the batches of every worker."""
    return f"switchgear.v1.{namespace}.kv_events.>"
