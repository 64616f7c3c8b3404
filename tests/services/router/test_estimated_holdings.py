from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.estimated_holdings import EstimatedHoldings

TTL_SECONDS = 100.0


class NaiveHoldings:
    """Every prompt with its time; a block is held while a prompt that has it is young, and among
    the most recent blocks, of which a prompt's first count as the more recent."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._prompts: list[tuple[float, tuple[int, ...]]] = []

    def given(self, prompt: tuple[int, ...], now: float) -> None:
        self._prompts.append((now, prompt[: self._capacity_blocks]))

    def overlap(self, prompt: Sequence[int], now: float) -> int:
        recent: list[int] = []
        for given_at, known in reversed(self._prompts):
            if given_at + TTL_SECONDS > now:
                recent += [block for block in known if block not in recent]
        held = recent[: self._capacity_blocks]
        depth = 0
        while depth < len(prompt) and prompt[depth] in held:
            depth += 1
        return depth


def hashes(tokens: str) -> tuple[int, ...]:
    """Like sequence hashes: one for each prefix."""
    return tuple(hash(tokens[: end + 1]) for end in range(len(tokens)))


prompts = st.text("ab", max_size=6).map(hashes)
steps = st.lists(st.tuples(st.floats(0, 60), prompts, prompts), max_size=30)


@given(steps, st.integers(1, 12))
def test_holdings_agree_with_a_list_of_prompts(
    steps: list[tuple[float, tuple[int, ...], tuple[int, ...]]], capacity_blocks: int
) -> None:
    holdings = EstimatedHoldings(capacity_blocks=capacity_blocks, ttl_seconds=TTL_SECONDS)
    naive = NaiveHoldings(capacity_blocks)
    now = 0.0
    for pause, prompt, asked in steps:
        now += pause
        holdings.given(prompt, now)
        naive.given(prompt, now)
        holdings.check_invariants()
        assert holdings.overlap(asked, now) == naive.overlap(asked, now)


def test_a_conversation_that_goes_on_is_found_at_its_whole_length() -> None:
    holdings = EstimatedHoldings(capacity_blocks=100, ttl_seconds=TTL_SECONDS)
    for end in (3, 5, 8):
        assert holdings.overlap(hashes("abcdefgh"[:end]), 0) == len(holdings)
        holdings.given(hashes("abcdefgh"[:end]), 0)


def test_a_block_is_forgotten_when_its_time_is_over() -> None:
    holdings = EstimatedHoldings(capacity_blocks=100, ttl_seconds=TTL_SECONDS)
    holdings.given(hashes("ab"), 0)
    assert holdings.overlap(hashes("ab"), TTL_SECONDS - 1) == 2
    assert holdings.overlap(hashes("ab"), TTL_SECONDS) == 0
    assert len(holdings) == 0


def test_room_is_made_from_the_end_of_the_oldest_prompt() -> None:
    holdings = EstimatedHoldings(capacity_blocks=4, ttl_seconds=TTL_SECONDS)
    holdings.given(hashes("aaa"), 0)
    holdings.given(hashes("bb"), 0)
    assert holdings.overlap(hashes("aaa"), 0) == 2
    assert holdings.overlap(hashes("bb"), 0) == 2
