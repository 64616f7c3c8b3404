"""What a request does when it loses its worker."""

from __future__ import annotations

import pytest

from libs.common.errors import (
    InternalError,
    InvalidRequest,
    NoLiveInstance,
    Overloaded,
    SwitchgearError,
    TransferFailed,
    WorkerLost,
)
from services.frontend.core.attempt import Attempts, MigrationPolicy


def attempts(max_attempts: int = 3, patience_seconds: float = 1.0) -> Attempts:
    return Attempts(
        prompt=[1, 2, 3],
        max_tokens=10,
        min_tokens=4,
        policy=MigrationPolicy(max_attempts, patience_seconds),
    )


def test_the_next_attempt_is_asked_only_for_the_rest() -> None:
    tried = attempts()
    tried.add([7, 8])
    assert tried.pause_after(WorkerLost("gone"), 5) == 0
    assert tried.token_ids == [1, 2, 3, 7, 8]
    assert (tried.remaining_tokens, tried.remaining_min_tokens) == (8, 2)
    assert tried.excluded_instance_ids == [5]


def test_min_tokens_do_not_go_below_zero() -> None:
    tried = attempts()
    tried.add(range(9))
    assert (tried.remaining_tokens, tried.remaining_min_tokens) == (1, 0)


def test_a_request_gives_up_when_it_has_lost_all_its_attempts() -> None:
    tried = attempts(max_attempts=3)
    assert [tried.pause_after(WorkerLost("gone"), i) for i in (1, 2, 3)] == [0, 0, None]


def test_what_others_depend_on_waits_for_room() -> None:
    tried = attempts(patience_seconds=0.5)
    tried.is_worth_waiting = True
    assert [tried.pause_after(Overloaded("full"), 0) for _ in range(3)] == [0.25, 0.25, None]


def test_nobody_is_excluded_when_it_was_nobodys_fault() -> None:
    tried = attempts()
    tried.pause_after(TransferFailed("broke"), 0)
    assert tried.excluded_instance_ids == []


@pytest.mark.parametrize(
    "error",
    [Overloaded("full"), InvalidRequest("bad"), InternalError("bug"), NoLiveInstance("none")],
)
def test_a_first_attempt_is_not_repeated_after(error: SwitchgearError) -> None:
    assert attempts().pause_after(error, 0) is None


@pytest.mark.parametrize("refusal", [NoLiveInstance("none"), Overloaded("full")])
def test_a_request_that_lost_its_worker_waits_for_another_as_long_as_it_may(
    refusal: SwitchgearError,
) -> None:
    tried = attempts(max_attempts=2, patience_seconds=1.0)
    assert tried.pause_after(WorkerLost("gone"), 5) == 0
    pauses = []
    while (pause := tried.pause_after(refusal, 0)) is not None:
        pauses.append(pause)
    assert sum(pauses) == 1.0
