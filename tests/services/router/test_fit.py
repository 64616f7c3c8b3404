from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.core.agreement import Reason
from services.router.core.fit import Make, make_of_model

makes = st.builds(Make, st.sampled_from("abc"), st.sampled_from([16, 32, 64]))


@given(st.lists(makes, min_size=1, max_size=9))
def test_a_model_has_what_more_than_half_have_else_what_the_eldest_has(found: list[Make]) -> None:
    model = make_of_model(found)
    for place in range(len(model)):
        values = [make[place] for make in found]
        common = [value for value in values if 2 * values.count(value) > len(values)]
        assert model[place] == (common or values)[0]


@pytest.mark.parametrize(
    ("make", "lacking"),
    [
        (Make("a", 16), set()),
        (Make("b", 16), {Reason.TOKENIZER_OR_TEMPLATE}),
        (Make("a", 32), {Reason.BLOCK_SIZE}),
        (Make("b", 32), {Reason.TOKENIZER_OR_TEMPLATE, Reason.BLOCK_SIZE}),
    ],
)
def test_a_worker_does_not_fit_for_each_thing_that_it_has_otherwise(
    make: Make, lacking: set[Reason]
) -> None:
    assert make.lacks(Make("a", 16)) == lacking
