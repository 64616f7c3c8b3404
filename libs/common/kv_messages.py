"""Stored blocks in KV event messages. See protos/switchgear/kv_events."""

from __future__ import annotations

from collections.abc import Sequence

from libs.common.kv_events import ChainStart, SequenceHash, Tier
from switchgear.kv_events.v1 import kv_events_pb2


def stored_message(
    hashes: Sequence[SequenceHash], chains: Sequence[ChainStart], tier: Tier = Tier.DEVICE
) -> kv_events_pb2.BlocksStored:
    return kv_events_pb2.BlocksStored(
        sequence_hashes=hashes,
        tier=kv_events_pb2.Tier.ValueType(tier),
        chain_starts=[start for start, _ in chains],
        chain_parents=[before or 0 for _, before in chains],
    )


def chains_of(message: kv_events_pb2.BlocksStored) -> tuple[ChainStart, ...]:
    """The chains of a message, without those that make no sense."""
    starts = message.chain_starts
    if not starts:
        return ()
    chains = []
    last, end = -1, len(message.sequence_hashes)
    for start, before in zip(starts, message.chain_parents, strict=False):
        if last < start < end:
            chains.append((start, before or None))
            last = start
    return tuple(chains)


def part_of(
    hashes: Sequence[SequenceHash], chains: Sequence[ChainStart], start: int, end: int
) -> tuple[Sequence[SequenceHash], list[ChainStart]]:
    """The blocks of [start, end), and their chains."""
    part = [(position - start, before) for position, before in chains if start <= position < end]
    if start and (not part or part[0][0]):
        part.insert(0, (0, hashes[start - 1]))
    return hashes[start:end], part
