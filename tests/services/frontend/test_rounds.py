"""What arrives is handed out in rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.rounds import (
    LONGEST_REST_SECONDS,
    SHORT_ROUND_SECONDS,
    Rounds,
    rest_seconds,
)


async def test_what_arrives_during_a_round_comes_together_in_the_next() -> None:
    rounds = Rounds[int]()
    seen = []
    rounds.put(1)
    async for arrived in rounds.each():
        seen.append(arrived)
        if arrived == [1]:
            rounds.put(2)
            rounds.put(3)
        else:
            rounds.end()
    assert seen == [[1], [2, 3]]


async def test_the_error_at_the_end_comes_after_what_arrived_before_it() -> None:
    rounds = Rounds[int]()
    rounds.put(1)
    rounds.end(ConnectionError("gone"))
    each = aiter(rounds.each())
    assert await anext(each) == [1]
    with pytest.raises(ConnectionError, match="gone"):
        await anext(each)


async def test_what_arrives_in_the_last_round_is_handed_out_before_the_end() -> None:
    rounds = Rounds[int]()
    rounds.put(1)
    seen = []
    async for arrived in rounds.each():
        seen += arrived
        if seen == [1]:
            rounds.put(2)
            rounds.end()
    assert seen == [1, 2]


async def test_an_end_with_nothing_before_it_is_the_end() -> None:
    rounds = Rounds[int]()
    rounds.end()
    assert [arrived async for arrived in rounds.each()] == []


@given(took_seconds=st.floats(0, 10))
def test_a_rest_takes_at_most_half_of_the_time(took_seconds: float) -> None:
    rest = rest_seconds(took_seconds)
    assert rest <= took_seconds
    assert rest <= LONGEST_REST_SECONDS
    assert (rest == 0) == (took_seconds < SHORT_ROUND_SECONDS)
