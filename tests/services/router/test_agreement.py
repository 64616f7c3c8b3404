from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.core.agreement import MIN_REQUESTS, Agreement, Outcome, Reason


def outcome(predicted: int, reported: int, **facts: Any) -> Outcome:
    return Outcome(
        predicted_tokens=predicted, reported_tokens=reported, block_size_tokens=16, **facts
    )


def judged(*outcomes: Outcome, times: int = 50) -> Reason | None:
    agreement = Agreement()
    for _ in range(times):
        for each in outcomes:
            agreement.add(each)
    return agreement.reason


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (outcome(0, 512), Reason.STORED_EVENTS_MISSING),
        (outcome(512, 0), Reason.REMOVED_EVENTS_MISSING),
        (outcome(0, 512, is_block_size_right=False), Reason.BLOCK_SIZE),
        (outcome(0, 512, has_common_files=False), Reason.TOKENIZER_OR_TEMPLATE),
        (outcome(512, 0, has_adapter=True), Reason.ADAPTER),
        (outcome(512, 0, has_events=False), Reason.ESTIMATE_WRONG),
    ],
)
def test_a_lasting_disagreement_has_a_likely_reason(wrong: Outcome, reason: Reason) -> None:
    assert judged(wrong) is reason


def test_an_adapter_is_the_reason_only_if_other_requests_agree() -> None:
    with_adapter = outcome(512, 0, has_adapter=True)
    assert judged(with_adapter, outcome(256, 256)) is Reason.ADAPTER
    assert judged(with_adapter, outcome(512, 0)) is Reason.REMOVED_EVENTS_MISSING


def test_a_short_disagreement_is_none() -> None:
    agreement = Agreement()
    for _ in range(20):
        agreement.add(outcome(512, 512))
    for _ in range(5):
        agreement.add(outcome(512, 0))
    assert agreement.reason is None


def test_a_few_requests_say_nothing() -> None:
    assert judged(outcome(0, 512), times=MIN_REQUESTS - 1) is None
    assert judged(outcome(0, 512), times=MIN_REQUESTS) is not None


def test_uncached_prompts_neither_hide_nor_show_a_disagreement() -> None:
    assert judged(outcome(0, 512), *[outcome(0, 0)] * 10) is Reason.STORED_EVENTS_MISSING
    assert judged(outcome(0, 0)) is None


def test_a_block_more_or_less_is_agreement() -> None:
    assert judged(outcome(512, 496)) is None
    assert judged(outcome(16, 32)) is None


def test_it_is_over_once_predictions_are_good_again() -> None:
    agreement = Agreement()
    for _ in range(100):
        agreement.add(outcome(0, 512))
    assert agreement.reason is not None
    for _ in range(100):
        agreement.add(outcome(512, 512))
    assert agreement.reason is None


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(-16, 16)), max_size=100))
def test_predictions_within_a_block_are_never_a_disagreement(
    pairs: list[tuple[int, int]],
) -> None:
    agreement = Agreement()
    for predicted, off in pairs:
        agreement.add(outcome(predicted, max(0, predicted + off)))
        assert agreement.reason is None
