from __future__ import annotations

import pytest

from services.router.core.request_stage import FOLLOWING, Remedy, Stage, prefill_seconds, remedy


def test_every_stage_can_be_reached_and_left_for_the_end() -> None:
    assert set().union(*FOLLOWING.values()) == set(Stage) - {Stage.ASKING}
    assert {stage for stage in Stage if Stage.ENDED in FOLLOWING[stage]} == set(Stage) - {
        Stage.ENDED
    }


def test_nothing_comes_after_the_end() -> None:
    assert not FOLLOWING[Stage.ENDED]


@pytest.mark.parametrize("can_be_repeated", [False, True])
def test_a_prompt_whose_prefill_leg_failed_is_computed_by_a_decode_worker(
    can_be_repeated: bool,
) -> None:
    failed = remedy(Stage.PREFILLING, can_be_repeated=can_be_repeated)
    assert failed is Remedy.PREFILL_THERE


@pytest.mark.parametrize("stage", [Stage.SENT, Stage.DECODING])
def test_a_decode_leg_is_tried_elsewhere_only_if_nothing_of_it_can_have_come(stage: Stage) -> None:
    assert remedy(stage, can_be_repeated=True) is Remedy.ELSEWHERE
    assert remedy(stage, can_be_repeated=False) is Remedy.HAND_BACK


@pytest.mark.parametrize(
    ("left_seconds", "expected"), [(None, 30), (100.0, 30), (10.0, 5), (-1.0, 0)]
)
def test_a_prefill_worker_has_half_of_what_is_left_of_the_deadline(
    left_seconds: float | None, expected: float
) -> None:
    assert prefill_seconds(30.0, left_seconds) == expected
