from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.held import HeldRequests

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), st.integers(0, 5), st.integers(0, 100)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(steps, st.integers(1, 6), st.integers(0, 100))
def test_those_that_fit_are_told_in_order_of_arrival(
    taken: list[tuple[str, int, int, int]], bound: int, free_tokens: int
) -> None:
    held: HeldRequests[int] = HeldRequests(bound)
    model: dict[int, tuple[int, int]] = {}
    for what, key, arrived_at, tokens in taken:
        if what == "remove":
            held.remove(key)
            model.pop(key, None)
        elif key not in model:
            is_held = held.add(key, arrived_at, tokens)
            assert is_held == (len(model) < bound)
            if is_held:
                model[key] = (arrived_at, tokens)
        assert len(held) == len(model)
    assert all((key in held) == (key in model) for key in range(10))
    # Those that arrived at the same time stand in the order that they were added in.
    expected = sorted((key for key in model if model[key][1] <= free_tokens), key=_arrival(model))
    assert held.fitting(free_tokens) == expected


def _arrival(model: dict[int, tuple[int, int]]) -> Callable[[int], tuple[int, int]]:
    order = list(model)
    return lambda key: (model[key][0], order.index(key))
