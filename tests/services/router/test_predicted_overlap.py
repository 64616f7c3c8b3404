from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from libs.common.hashing import chain
from services.router.core.predicted_overlap import STRIDE_BLOCKS, PredictedOverlap
from services.router.core.workers import InstanceId

PROMPTS = [
    chain([*range(shared), *range(1_000 * n, 1_000 * n + 30)])
    for n, shared in enumerate((0, 8, 20, 40), start=1)
]

steps = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.booleans()), max_size=30)


@given(steps, st.integers(0, 3))
def test_it_agrees_with_comparing_all_prompts_in_progress(
    happenings: list[tuple[int, int, bool]], asked: int
) -> None:
    predicted = PredictedOverlap()
    live: list[tuple[int, int]] = []
    for instance, number, is_start in happenings:
        if is_start:
            live.append((instance, number))
            predicted.sent(InstanceId(instance), PROMPTS[number])
        elif (instance, number) in live:
            live.remove((instance, number))
            predicted.ended(InstanceId(instance), PROMPTS[number])
    expected: dict[int, int] = {}
    for instance, number in live:
        common = 0
        for ours, theirs in zip(PROMPTS[number], PROMPTS[asked], strict=False):
            if ours != theirs:
                break
            common += 1
        if depth := common // STRIDE_BLOCKS * STRIDE_BLOCKS:
            expected[instance] = max(depth, expected.get(instance, 0))
    assert predicted.overlap(PROMPTS[asked]) == expected


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    predicted = PredictedOverlap()
    for number in (0, 1, 1, 2):
        predicted.sent(InstanceId(1), PROMPTS[number])
    for number in (1, 2, 0, 1):
        predicted.ended(InstanceId(1), PROMPTS[number])
    assert len(predicted) == 0
