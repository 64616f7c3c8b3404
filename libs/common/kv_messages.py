"""Blocks in KV event messages. See protos/switchgear/kv_events."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache

from libs.common.kv_events import ChainStart, SequenceHash, Tier
from switchgear.kv_events.v1 import kv_events_pb2

FEW_BLOCKS = 32
"""So few make a list sooner than an array."""

_SEQUENCE_HASHES_KEY = b"\x0a"
"""Of field 1, as a run of bytes."""


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


def hashes_of(
    message: kv_events_pb2.BlocksStored | kv_events_pb2.BlocksRemoved,
) -> Sequence[SequenceHash]:
    """Its sequence hashes: a list of few; of many an array, which is made sooner, takes a fifth of
    the memory, and no time to take apart again.

    In bytes they lie side by side, as in an array, and come first, being the first field. Should
    they ever not, a list will do.
    """
    blocks = len(message.sequence_hashes)
    if blocks > FEW_BLOCKS and sys.byteorder == "little":
        data, before = message.SerializeToString(), _before_hashes(blocks)
        if data.startswith(before):
            return array("Q", data[len(before) : len(before) + 8 * blocks])
    # A slice is a list, made much faster than a tuple.
    return message.sequence_hashes[:]


@lru_cache(maxsize=1_024)
def _before_hashes(blocks: int) -> bytes:
    """What precedes so many hashes: the field's key, and its length seven bits at a time."""
    rest, before = 8 * blocks, bytearray(_SEQUENCE_HASHES_KEY)
    while rest > 0x7F:
        before.append(rest & 0x7F | 0x80)
        rest >>= 7
    before.append(rest)
    return bytes(before)


def part_of(
    hashes: Sequence[SequenceHash], chains: Sequence[ChainStart], start: int, end: int
) -> tuple[Sequence[SequenceHash], list[ChainStart]]:
    """The blocks of [start, end), and their chains."""
    part = [(position - start, before) for position, before in chains if start <= position < end]
    if start and (not part or part[0][0]):
        part.insert(0, (0, hashes[start - 1]))
    return hashes[start:end], part
