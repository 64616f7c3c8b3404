"""Blocks on their way through messages."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.kv_events import ChainStart
from libs.common.kv_messages import FEW_BLOCKS, chains_of, hashes_of, part_of, stored_message
from switchgear.kv_events.v1 import kv_events_pb2


@given(st.integers(0, 20), st.dictionaries(st.integers(0, 19), st.none() | st.just(99)), st.data())
def test_parts_tell_of_every_block_what_the_whole_told(
    blocks: int, starts: dict[int, int | None], data: st.DataObject
) -> None:
    hashes = range(1, blocks + 1)
    chains = sorted((position, before) for position, before in starts.items() if position < blocks)
    cut = data.draw(st.integers(1, 21))
    told: list[ChainStart] = []
    for start in range(0, blocks, cut):
        message = stored_message(*part_of(hashes, chains, start, start + cut))
        message = kv_events_pb2.BlocksStored.FromString(message.SerializeToString())
        part = dict(chains_of(message))
        befores = (None, *message.sequence_hashes)
        told += [
            (block, part.get(position, befores[position]))
            for position, block in enumerate(message.sequence_hashes)
        ]
    whole = dict(chains)
    befores = (None, *hashes)
    assert told == [
        (block, whole.get(position, befores[position])) for position, block in enumerate(hashes)
    ]


def test_chain_starts_that_make_no_sense_are_left_out() -> None:
    message = kv_events_pb2.BlocksStored(
        sequence_hashes=[1, 2, 3], chain_starts=[1, 1, 0, 2, 3], chain_parents=[7, 8, 9, 0, 5]
    )
    assert chains_of(message) == ((1, 7), (2, None))


@pytest.mark.parametrize("blocks", [0, 1, FEW_BLOCKS, FEW_BLOCKS + 1, 64, 2_047, 2_048, 300_000])
def test_hashes_of_a_message_are_those_that_it_has(blocks: int) -> None:
    rng = random.Random(blocks)
    hashes = [rng.getrandbits(64) for _ in range(blocks)]
    chains: list[ChainStart] = [(0, 5), (blocks // 2, None)]
    for message in (
        stored_message(hashes, chains),
        kv_events_pb2.BlocksRemoved(sequence_hashes=hashes, tier=kv_events_pb2.TIER_HOST),
    ):
        assert list(hashes_of(message)) == hashes
