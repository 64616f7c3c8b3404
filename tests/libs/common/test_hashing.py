from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from libs.common.hashing import chain, local_hashes, seed_of, sequence_hashes

TOKENS = range(1, 11)


def test_hashes_are_those_of_dynamo() -> None:
    assert local_hashes(TOKENS, 4) == [0xCB38E4D7FB2DCA5C, 0xE8D3EC39B907B74C]
    assert sequence_hashes(TOKENS, 4) == [0xCB38E4D7FB2DCA5C, 0x44A2B2379D6D3C3D]


def test_an_adapter_has_blocks_of_its_own() -> None:
    seed = seed_of(lora_name="my-lora")
    assert local_hashes(TOKENS, 4, seed) == [0xD97C824A0D4BDAB1, 0x6DE6CBEC6A335EFE]


def test_a_salt_isolates_and_is_no_adapter() -> None:
    seeds = {seed_of(), seed_of(lora_name="a"), seed_of(cache_salt="a"), seed_of(cache_salt="b")}
    assert len(seeds) == 4


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(tokens, st.integers(1, 8), st.data())
def test_a_sequence_hash_depends_on_all_tokens_before_it_and_on_nothing_after(
    prompt: list[int], block_size: int, data: st.DataObject
) -> None:
    hashes = sequence_hashes(prompt, block_size)
    assert len(hashes) == len(prompt) // block_size
    cut = data.draw(st.integers(0, len(prompt)))
    assert sequence_hashes(prompt[:cut], block_size) == hashes[: cut // block_size]
    if hashes:
        changed = [prompt[0] ^ 1, *prompt[1:]]
        assert not set(sequence_hashes(changed, block_size)) & set(hashes)


@given(tokens, st.integers(1, 8), st.data())
def test_a_chain_can_be_continued_from_any_block(
    prompt: list[int], block_size: int, data: st.DataObject
) -> None:
    local = local_hashes(prompt, block_size)
    whole = chain(local)
    cut = data.draw(st.integers(0, len(local)))
    parent = whole[cut - 1] if cut else None
    assert chain(local[cut:], parent) == whole[cut:]
