from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.core.candidates import STEP_TOKENS, TieredOverlap
from services.router.core.decision import (
    Candidate,
    Decision,
    Handover,
    Overlaps,
    Policy,
    Request,
    decide,
)
from services.router.core.policies import POLICIES
from services.router.core.workers import Booking, InstanceId, Load, Role, Worker

SIZE = 16
REQUEST = Request(model="m", prompt_tokens=64, block_size_tokens=SIZE)


def worker(
    number: int,
    *,
    queued: int = 0,
    active: int = 0,
    running: int = 0,
    waiting: int = 0,
    total: int = 0,
) -> Worker:
    made = Worker(
        instance_id=InstanceId(number),
        name=f"w{number}",
        role=Role.DECODE,
        model="m",
        block_size_tokens=SIZE,
    )
    made.load = Load(
        running_requests=running,
        waiting_requests=waiting,
        queued_prefill_tokens=queued,
        active_kv_blocks=active,
        total_kv_blocks=total,
    )
    made.is_available = True
    return made


def decided(
    workers: Iterable[Worker],
    overlaps: Overlaps | None = None,
    policy: Policy | str = "kv",
    request: Request = REQUEST,
    seed: int = 0,
) -> Decision:
    if isinstance(policy, str):
        policy = Policy(decode_policy=policy)
    decision = decide(request, workers, overlaps or {}, policy, Random(seed))
    assert decision is not None
    return decision


def chosen(*args: object, **kwargs: object) -> int:
    return decided(*args, **kwargs).decode.worker.instance_id  # type: ignore[arg-type]


def costs(decision: Decision) -> dict[int, float]:
    return {one.worker.instance_id: one.cost for one in decision.decode_candidates}


def test_the_example_of_the_manual_comes_out() -> None:
    workers = [worker(1, running=2, active=20), worker(2)]
    found = costs(decided(workers, {InstanceId(1): 2}))
    assert found == {
        1: pytest.approx(32 + 0.2 * 352 + 128 * 2 + 0.02 * (32 + STEP_TOKENS) * 2),
        2: pytest.approx(64 + 12.8),
    }


fleets = st.lists(
    st.tuples(
        st.integers(0, 5_000),
        st.integers(0, 300),
        st.integers(0, 40),
        st.integers(0, 3),
        st.integers(0, 400),
        st.lists(st.integers(1, 900), max_size=3),
    ),
    min_size=1,
    max_size=8,
)
weights = st.floats(0, 5)


@given(
    fleets,
    st.integers(1, 700),
    st.dictionaries(st.integers(1, 8), st.integers(1, 50)),
    st.tuples(weights, weights, weights, weights),
    st.integers(0, 99),
)
def test_kv_takes_the_cheapest_by_the_formula_of_those_with_room(
    fleet: list[tuple[int, int, int, int, int, list[int]]],
    prompt_tokens: int,
    held: dict[int, int],
    prices: tuple[float, float, float, float],
    seed: int,
) -> None:
    prefill, decode, stall, overflow = prices
    workers = []
    expected = {}
    roomy = []
    overlaps: dict[InstanceId, int] = {}
    for number, (queued, active, running, waiting, total, booked) in enumerate(fleet, start=1):
        workers.append(
            worker(
                number, queued=queued, active=active, running=running, waiting=waiting, total=total
            )
        )
        for tokens in booked:
            workers[-1].book(Booking(tokens, 0))
        blocks = min(held.get(number, 0), prompt_tokens // SIZE)
        overlaps[InstanceId(number)] = blocks
        new = max(1, prompt_tokens - blocks * SIZE)
        kv = (active + math.ceil(prompt_tokens / SIZE) - blocks) * SIZE
        expected[number] = prefill * (queued + sum(booked) + new) + decode * kv
        # The first one to come begins a step of an idle worker at once.
        waiting_for_a_step = waiting + len(booked) - (not running)
        step = 0 if waiting_for_a_step > 0 else STEP_TOKENS
        requests = running + waiting + len(booked)
        expected[number] += stall * (new + step) * requests
        expected[number] += 128 * requests
        if total:
            expected[number] += overflow * max(0, kv - total * SIZE)
        if not total or not requests or kv + queued <= total * SIZE:
            roomy.append(number)
    policy = Policy(
        prefill_weight=prefill, decode_weight=decode, stall_weight=stall, overflow_weight=overflow
    )
    request = Request(model="m", prompt_tokens=prompt_tokens, block_size_tokens=SIZE)
    decision = decided(workers, overlaps, policy, request, seed)
    assert costs(decision) == pytest.approx(expected)
    assert decision.has_room == bool(roomy)
    assert decision.decode.cost == pytest.approx(
        min(expected[number] for number in roomy or expected)
    )
    assert [one.cost for one in decision.decode_candidates] == sorted(costs(decision).values())


def test_a_prompt_waits_for_a_step_until_its_worker_says_that_it_runs() -> None:
    """Workers tell their load amid a step, too, when a request has come."""
    busy = worker(1, running=2)
    coming = [busy.has_prompt_coming]
    booking = Booking(100, 7)
    busy.book(booking)
    coming.append(busy.has_prompt_coming)
    busy.load = Load(running_requests=2, waiting_requests=1, queued_prefill_tokens=100)
    busy.unbook(booking)
    coming.append(busy.has_prompt_coming)
    busy.load = Load(running_requests=3, queued_prefill_tokens=100)
    coming.append(busy.has_prompt_coming)
    assert coming == [False, True, True, False]


@given(fleets, st.integers(0, 99))
def test_least_load_ignores_what_is_held(
    fleet: list[tuple[int, int, int, int, int, list[int]]], seed: int
) -> None:
    workers = [worker(n, queued=q, active=a) for n, (q, a, *_) in enumerate(fleet)]
    overlaps = {InstanceId(0): 4}
    picked = decided(workers, overlaps, "least-load", seed=seed).decode.worker
    loads = [w.queued_prefill_tokens + 0.2 * w.active_kv_blocks * SIZE for w in workers]
    assert loads[picked.instance_id] == pytest.approx(min(loads))


@given(fleets, st.integers(0, 999))
def test_power_of_two_takes_the_less_loaded_of_two(
    fleet: list[tuple[int, int, int, int, int, list[int]]], seed: int
) -> None:
    workers = [worker(n, queued=q, active=a) for n, (q, a, *_) in enumerate(fleet)]
    decision = decided(workers, policy="power-of-two", seed=seed)
    drawn = {n: cost for n, cost in costs(decision).items() if cost < math.inf}
    assert len(drawn) == min(2, len(workers))
    assert drawn[decision.decode.worker.instance_id] == min(drawn.values())


def test_power_of_two_draws_every_pair() -> None:
    workers = [worker(n, queued=100 * n) for n in range(4)]
    seen = {chosen(workers, policy="power-of-two", seed=seed) for seed in range(200)}
    assert seen == {0, 1, 2}  # Never the busiest: it is drawn with a less busy one.


def test_round_robin_gives_everyone_a_turn_and_then_again() -> None:
    workers = [worker(n) for n in range(5)]
    order = []
    for seed in range(15):
        taken = decided(workers, policy="round-robin", seed=seed).decode
        taken.worker.book(taken.booking)
        order.append(taken.worker.instance_id)
    assert sorted(order[:5]) == [0, 1, 2, 3, 4]
    assert order[5:10] == order[:5] == order[10:]


def test_random_takes_everyone_whatever_the_load() -> None:
    workers = [worker(n, queued=10_000 * n) for n in range(4)]
    seen = [chosen(workers, policy="random", seed=seed) for seed in range(400)]
    assert all(60 < seen.count(n) < 140 for n in range(4))


def test_direct_serves_requests_that_name_their_worker_only() -> None:
    workers = [worker(1), worker(2)]
    policy = Policy(decode_policy="direct")
    pinned = Request(
        model="m", prompt_tokens=64, block_size_tokens=SIZE, pinned={Role.DECODE: InstanceId(2)}
    )
    assert decide(REQUEST, workers, {}, policy, Random(0)) is None
    assert chosen(workers, policy=policy, request=pinned) == 2


def test_without_a_prefill_worker_that_may_be_taken_the_decode_worker_computes_the_prompt() -> None:
    giver = Worker(
        instance_id=InstanceId(9),
        name="p",
        role=Role.PREFILL,
        model="m",
        block_size_tokens=SIZE,
        transfer_backend="nixl",
    )
    giver.is_available = True
    taker = worker(1)
    taker.transfer_backend = "nixl"
    request = Request(model="m", prompt_tokens=1_000, block_size_tokens=SIZE)
    decision = decided([giver, taker], {}, Policy(prefill_policy="direct"), request)
    assert (decision.prefill, decision.handover) == (None, Handover.NO_PREFILL_WORKER)


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"direct"}))
def test_every_policy_serves_with_a_single_worker_and_any_temperature(name: str) -> None:
    assert chosen([worker(1)], policy=Policy(decode_policy=name, temperature=2.0)) == 1


def test_temperature_never_draws_whom_the_policy_rules_out() -> None:
    workers = [worker(n, queued=100 * n) for n in range(3)]
    policy = Policy(decode_policy="power-of-two", temperature=5.0)
    for seed in range(100):
        decision = decided(workers, policy=policy, seed=seed)
        assert decision.decode.cost < math.inf


def test_blocks_in_lower_tiers_count_for_less() -> None:
    workers = [worker(n) for n in range(1, 5)]
    overlaps = {
        InstanceId(1): TieredOverlap(device_blocks=2),
        InstanceId(2): TieredOverlap(device_blocks=0, host_blocks=2),
        InstanceId(3): TieredOverlap(device_blocks=0, host_blocks=0, disk_blocks=2),
    }
    decision = decided(workers, overlaps)
    new = {c.worker.instance_id: c.new_prefill_tokens for c in decision.decode_candidates}
    assert new == {1: 32, 2: 40, 3: 56, 4: 64}
    decision = decided(workers, overlaps, policy=Policy(host_credit=1.0, disk_credit=0.5))
    new = {c.worker.instance_id: c.new_prefill_tokens for c in decision.decode_candidates}
    assert new == {1: 32, 2: 32, 3: 48, 4: 64}


def test_a_session_stays_until_its_worker_is_busier_by_what_it_is_worth() -> None:
    request = Request(
        model="m", prompt_tokens=64, block_size_tokens=SIZE, session_worker=InstanceId(2)
    )
    policy = Policy(session_tokens=100)
    assert chosen([worker(1), worker(2, queued=99)], None, policy, request) == 2
    assert chosen([worker(1), worker(2, queued=101)], None, policy, request) == 1


def test_a_hot_prefix_spreads_when_waiting_costs_more_than_computing_it_again() -> None:
    request = Request(model="m", prompt_tokens=1_600, block_size_tokens=SIZE)
    holder, other = worker(1), worker(2)
    taken: list[int] = []
    while not taken or taken[-1] == 1:
        best = decided([holder, other], {InstanceId(1): 90}, request=request).decode
        best.worker.book(best.booking)
        taken.append(best.worker.instance_id)
    # Each adds 160 tokens to compute, its KV and itself; elsewhere 1,440 more were to be computed.
    assert 3 <= len(taken) <= 7


def test_a_worker_without_room_is_shunned() -> None:
    full = worker(1, active=100, total=100)
    assert chosen([full, worker(2, queued=200, total=100)], {InstanceId(1): 2}) == 2


def test_prompts_avoid_workers_where_many_would_stand_still() -> None:
    request = Request(model="m", prompt_tokens=1_000, block_size_tokens=SIZE)
    assert chosen([worker(1, running=40), worker(2, queued=700)], request=request) == 2


def test_a_short_prompt_joins_one_that_waits_rather_than_take_a_step_of_its_own() -> None:
    """A step of its own would hold up as many again."""
    workers = [worker(1, running=50), worker(2, running=50)]
    workers[0].book(Booking(200, 13))
    assert chosen(workers) == 1
    # An idle worker holds up nobody.
    assert chosen([*workers, worker(3)]) == 3


def test_a_prompt_does_not_join_one_whose_step_has_begun() -> None:
    """What the worker has counted was there when its step began."""
    assert chosen([worker(1, running=50, queued=200), worker(2, running=50)]) == 2
    # Likewise what an idle worker got first, which does not wait for others.
    idle = [worker(1), worker(2)]
    for one, tokens in zip(idle, (200, 150), strict=True):
        one.book(Booking(tokens, 0))
    policy = Policy(decode_weight=0.0, request_tokens=0.0, stall_weight=1.0)
    assert chosen(idle, policy=policy) == 2
    idle[0].book(Booking(1, 0))
    assert chosen(idle, policy=policy) == 1


def test_candidates_stay_as_they_were_when_it_was_decided() -> None:
    workers = [worker(1, queued=10), worker(2, active=3)]
    decision = decided(workers)
    before = [candidate_terms(one) for one in decision.decode_candidates]
    again = decided(workers)
    for one in workers:
        one.book(Booking(500, 50))
        one.load = Load(running_requests=7, queued_prefill_tokens=900, total_kv_blocks=1)
    assert [candidate_terms(one) for one in again.decode_candidates] == before


def candidate_terms(candidate: Candidate) -> tuple[object, ...]:
    return (
        candidate.queued_prefill_tokens,
        candidate.decode_tokens,
        candidate.requests,
        candidate.stalled_tokens,
        candidate.overflow_tokens,
        candidate.cost,
    )
