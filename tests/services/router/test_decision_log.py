from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.decision import Policy, Request, decide
from services.router.core.decision_log import DecisionLog, Record
from services.router.core.workers import Worker
from tests.services.router.test_decision import worker


def record(request_id: str, workers: int = 1, among: Sequence[Worker] = ()) -> Record:
    """Of a decision among so many workers, or among these."""
    request = Request(model="m", prompt_tokens=10, block_size_tokens=10)
    among = among or [worker(number) for number in range(workers)]
    decision = decide(request, among, {}, Policy(), Random(0))
    assert decision is not None
    return Record(
        request_id=request_id,
        model="m",
        decided_at=0,
        prompt_tokens=10,
        block_size_tokens=10,
        decision=decision,
        policy=Policy(),
        are_overlaps_known=True,
    )


def ids(records: list[Record]) -> list[str]:
    return [record.request_id for record in records]


@given(st.lists(st.sampled_from("abc")), st.integers(0, 5), st.integers(0, 4))
def test_the_last_records_are_found_newest_first(names: str, size: int, limit: int) -> None:
    log = DecisionLog(size)
    for name in names:
        log.add(record(name))
    kept = list(reversed(names[-size:] if size else ""))
    assert ids(log.find()) == kept
    assert ids(log.find("a", limit)) == [name for name in kept if name == "a"][: limit or None]


@given(st.lists(st.integers(1, 6)))
def test_candidates_are_bounded_too(sizes: list[int]) -> None:
    log = DecisionLog(100, max_candidates=10)
    for size in sizes:
        log.add(record("r", workers=size))
        assert sum(kept.candidates for kept in log.find()) <= 10
    assert not sizes or len(log) >= 1


def test_a_record_that_grew_since_it_came_is_counted_out_as_it_was_counted_in() -> None:
    log = DecisionLog(10, max_candidates=10)
    grown = record("a", workers=2)
    log.add(grown)
    grown.hand_over(record("a", workers=9))
    assert [c.worker.name for c in grown.decision.decode_candidates] == [f"w{n}" for n in range(9)]
    log.add(record("b", workers=9))
    log.add(record("c", workers=2))
    assert ids(log.find()) == ["c"]
