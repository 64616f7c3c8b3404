"""What is said of a decision is all that it depended on, as of its moment."""

from __future__ import annotations

import math
from io import StringIO
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.local.explaining import shown
from services.router.core.decision import Policy, Request, decide
from services.router.core.decision_log import Record
from services.router.core.hold import Hold, HoldEnd
from services.router.core.policies import POLICIES
from services.router.core.workers import Booking, InstanceId, Load, Role, Worker
from services.router.explanation import explanation_of
from switchgear.router.v1 import router_pb2
from tests.services.router.test_decision import worker

BLOCK_SIZE_TOKENS = 10

loads = st.builds(
    Load,
    running_requests=st.integers(0, 20),
    waiting_requests=st.integers(0, 5),
    queued_prefill_tokens=st.integers(0, 5000),
    active_kv_blocks=st.integers(0, 600),
    total_kv_blocks=st.sampled_from([0, 500]),
)
prices = st.floats(0, 10)
policies = st.builds(
    Policy,
    prefill_weight=prices,
    decode_weight=prices,
    stall_weight=prices,
    overflow_weight=prices,
    session_tokens=st.floats(0, 1000),
)


def recorded(
    workers: list[Worker],
    policy: Policy,
    *,
    prompt_tokens: int = 1000,
    overlap_blocks: int = 0,
    session_worker: InstanceId | None = None,
) -> Record:
    """A decision on a prompt of which each worker holds as much."""
    request = Request(
        model="m",
        prompt_tokens=prompt_tokens,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        session_worker=session_worker,
    )
    overlaps = {each.instance_id: overlap_blocks for each in workers}
    decision = decide(request, workers, overlaps, policy, Random(0))
    assert decision is not None
    return Record(
        request_id="r",
        model="m",
        decided_at=0,
        prompt_tokens=prompt_tokens,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        decision=decision,
        policy=policy,
        are_overlaps_known=True,
        session_worker=session_worker,
    )


def sum_of_terms(candidate: router_pb2.Candidate, weights: router_pb2.Weights) -> float:
    return (
        weights.prefill_weight * (candidate.queued_prefill_tokens + candidate.new_prefill_tokens)
        + weights.decode_weight * candidate.decode_tokens
        + weights.request_tokens * candidate.requests
        + weights.stall_weight * candidate.stalled_tokens
        + weights.overflow_weight * candidate.overflow_tokens
        - weights.session_tokens * candidate.is_of_session
    )


@given(
    st.lists(loads, min_size=2, max_size=5),
    policies,
    st.integers(1, 3000),
    st.integers(0, 50),
    st.sampled_from([None, *map(InstanceId, range(1, 5))]),
)
def test_the_terms_that_are_shown_times_the_weights_add_up_to_the_cost(
    loads: list[Load],
    policy: Policy,
    prompt_tokens: int,
    overlap_blocks: int,
    session_worker: InstanceId | None,
) -> None:
    workers = []
    for number, load in enumerate(loads):
        workers.append(worker(number, Role.DECODE if number else Role.PREFILL))
        workers[-1].load = load
    said = explanation_of(
        recorded(
            workers,
            policy,
            prompt_tokens=prompt_tokens,
            overlap_blocks=min(overlap_blocks, prompt_tokens // BLOCK_SIZE_TOKENS),
            session_worker=session_worker,
        ),
        0,
    )
    for leg in (said.decode, said.prefill, said.whole):
        for candidate in leg.candidates:
            if leg is said.prefill:
                assert not candidate.is_of_session
                candidate.requests = 0  # Known, and not charged.
            assert candidate.cost == pytest.approx(sum_of_terms(candidate, leg.weights))


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"direct"}))
def test_what_is_remembered_does_not_change_with_the_workers(policy: str) -> None:
    workers = [worker(1, Role.PREFILL), worker(2, active=3), worker(3, queued=7)]
    for each in workers:
        each.load = Load(1, 1, 100, 20, 30)
    ours, later = (
        recorded(workers, Policy(prefill_policy=policy, decode_policy=policy)) for _ in range(2)
    )
    said = explanation_of(ours, 0)
    for each in workers:
        each.load = Load(9, 9, 9000, 900, 1000)
        each.book(Booking(500, 50))
        each.is_available = False
    # One that is first asked for now says the same as one that was asked for before.
    for leg in ("decode", "prefill", "whole"):
        now, then = getattr(explanation_of(later, 0), leg), getattr(said, leg)
        terms = {
            c.worker.name: (c.decode_tokens, c.stalled_tokens, c.overflow_tokens)
            for c in now.candidates
        }
        assert terms == {
            c.worker.name: (c.decode_tokens, c.stalled_tokens, c.overflow_tokens)
            for c in then.candidates
        }
    assert explanation_of(ours, 0) == said


def test_a_worker_that_is_not_taken_has_an_infinite_cost_and_is_shown_so() -> None:
    policy = Policy(decode_policy="power-of-two", prefill_policy="power-of-two")
    said = explanation_of(recorded([worker(number) for number in range(3)], policy), 0)
    assert [math.isinf(c.cost) for c in said.decode.candidates] == [False, False, True]
    console = Console(width=200, record=True, file=StringIO())
    console.print(shown("router-0", said))
    *_, last = console.export_text().split()
    assert last == "never"


def test_how_long_a_request_was_held_is_shown_with_who_was_nearest_and_what_came_of_it() -> None:
    policy = Policy(decode_policy="kv", prefill_policy="kv")
    record = recorded([worker(0)], policy)
    holds = [
        Hold(began_at=1.0, nearest=worker(0), lacking_tokens=512, is_prompt_computed=is_computed)
        for is_computed in (False, True)
    ]
    holds[0].ended(3.5, HoldEnd.SENT)
    record.holds = tuple(holds)
    console = Console(width=200, record=True, file=StringIO())
    console.print(shown("router-0", explanation_of(record, now=8.0)))
    lines = [line.split() for line in console.export_text().splitlines() if "  held  " in line]
    assert [" ".join(line) for line in lines] == [
        "held 2.500 s for room at a decode worker, until there was room;"
        " w0 was nearest to it and lacked 512 tokens",
        "held 7.000 s for room at a decode worker, its prompt computed, and it still is;"
        " w0 was nearest to it and lacked 512 tokens",
    ]
