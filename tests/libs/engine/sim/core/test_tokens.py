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
