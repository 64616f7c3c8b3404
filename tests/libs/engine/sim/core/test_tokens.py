import math

from hypothesis import given
from hypothesis import strategies as st

from libs.engine.sim.core.tokens import TokenSource, fold, seed_state

states = st.integers(0, 2**64 - 1)


@given(states, st.lists(st.integers(0, 2**32 - 1), min_size=1, unique=True))
def test_every_drawn_token_is_of_the_vocabulary(state: int, vocabulary: list[int]) -> None:
    assert TokenSource(vocabulary).draw(state) in vocabulary


@given(states, st.sets(st.integers(0, 9)))
def test_barred_tokens_are_drawn_only_when_all_are_barred(state: int, barred: set[int]) -> None:
    token = TokenSource(range(10)).draw_other(state, barred)
    assert token not in barred or len(barred) == 10


@given(states)
def test_the_end_of_the_sequence_is_drawn_never_or_always_at_the_extremes(state: int) -> None:
    assert TokenSource(range(10), eos_token_id=77, eos_probability=0.0).draw(state) != 77
    assert TokenSource(range(10), eos_token_id=77, eos_probability=1.0).draw(state) == 77


def test_draws_spread_over_the_vocabulary_and_meet_the_end_about_as_often_as_asked() -> None:
    source = TokenSource(range(100), eos_token_id=100, eos_probability=0.25)
    drawn, state = [], 1
    for _ in range(4_000):
        drawn.append(source.draw(state))
        state = fold(state, drawn[-1])
    assert len(set(drawn)) == 101
    assert 800 < drawn.count(100) < 1_200


def test_seeds_differ_from_one_another_and_from_none() -> None:
    assert len({seed_state(seed) for seed in (None, 0, 1, 2**64 - 2)}) == 4


def test_a_bias_changes_the_odds_as_it_says() -> None:
    source = TokenSource(range(100))
    drawn, state = [], 1
    for _ in range(4_000):
        drawn.append(source.draw_biased(state, {7: math.log(99), 8: -100.0}))
        state = fold(state, drawn[-1])
    # 99 of 197 parts, and next to none.
    assert 1_850 < drawn.count(7) < 2_150
    assert 8 not in drawn


@given(states, st.integers(0, 2**32 - 1))
def test_the_greatest_bias_forces_any_token(state: int, token: int) -> None:
    assert TokenSource(range(100)).draw_biased(state, {token: 100.0}) == token


@given(states, st.integers(0, 50), st.integers(0, 20))
def test_log_probabilities_are_of_one_distribution_with_the_likeliest_first(
    state: int, token: int, alternatives: int
) -> None:
    source = TokenSource(range(40))
    (first, logprob), *others = source.logprobs(state, token, alternatives)
    assert first == token
    assert len(others) == len(dict(others)) == alternatives
    assert [value for _, value in others] == sorted((v for _, v in others), reverse=True)
    assert sum(math.exp(value) for _, value in others) < 1
    if others:
        assert others[0][0] == source.draw(state)
    assert dict(source.logprobs(state, token, 20)[1:]).get(token, logprob) == logprob
