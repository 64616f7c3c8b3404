from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.candidates import TieredOverlap
from services.router.core.decision import (
    Decision,
    Handover,
    Overlaps,
    Pick,
    Policy,
    Prompt,
    Request,
    decide,
)
from services.router.core.workers import Booking, InstanceId, Load, Role, Worker

POLICY = Policy(decode_weight=1.0, request_tokens=0.0, stall_weight=0.0)
LONG = Request(model="m", prompt_tokens=1000, block_size_tokens=10)
SHORT = Request(model="m", prompt_tokens=100, block_size_tokens=10)


def worker(
    number: int,
    role: Role = Role.DECODE,
    *,
    queued: int = 0,
    active: int = 0,
    model: str = "m",
    block_size: int = 10,
    backend: str = "nixl",
) -> Worker:
    made = Worker(
        instance_id=InstanceId(number),
        name=f"w{number}",
        role=role,
        model=model,
        block_size_tokens=block_size,
        transfer_backend=backend,
    )
    made.load = Load(queued_prefill_tokens=queued, active_kv_blocks=active)
    made.is_available = True
    return made


def choose(
    request: Request, workers: list[Worker], overlaps: Overlaps | None = None, seed: int = 0
) -> tuple[int | None, int | None]:
    """Prefill and decode worker by number."""
    decision = decide(request, workers, overlaps or {}, POLICY, Random(seed))
    return _numbers(decision)


def _numbers(decision: Decision | None) -> tuple[int | None, int | None]:
    if decision is None:
        return None, None
    prefill = decision.prefill.worker.instance_id if decision.prefill else None
    return prefill, decision.decode.worker.instance_id


def test_the_worker_that_holds_the_prefix_is_preferred() -> None:
    assert choose(SHORT, [worker(1), worker(2)], {InstanceId(2): 5}) == (None, 2)


def test_a_holder_with_a_long_queue_is_passed_over() -> None:
    workers = [worker(1), worker(2, queued=500)]
    assert choose(SHORT, workers, {InstanceId(2): 5}) == (None, 1)


def test_a_long_prompt_goes_to_the_prefill_worker_that_holds_most_of_it() -> None:
    workers = [worker(1, Role.PREFILL), worker(2, Role.PREFILL), worker(3)]
    assert choose(LONG, workers, {InstanceId(2): 90}) == (2, 3)


def test_a_short_prompt_is_computed_by_the_decode_worker() -> None:
    assert choose(SHORT, [worker(1, Role.PREFILL), worker(2)]) == (None, 2)


def test_a_prompt_that_the_decode_worker_mostly_holds_is_computed_there() -> None:
    workers = [worker(1, Role.PREFILL), worker(2)]
    assert choose(LONG, workers, {InstanceId(2): 80}) == (None, 2)
    long = Request(model="m", prompt_tokens=10_000, block_size_tokens=10)
    assert choose(long, workers, {InstanceId(2): 700}) == (1, 2)


def test_with_a_remote_prefill_the_decode_worker_is_chosen_by_load() -> None:
    workers = [worker(1, Role.PREFILL), worker(2, active=500), worker(3, active=100)]
    assert choose(LONG, workers, {InstanceId(2): 30}) == (1, 3)


def test_without_a_prefill_worker_a_long_prompt_is_served_whole() -> None:
    assert choose(LONG, [worker(1)]) == (None, 1)


def test_workers_that_cannot_exchange_kv_are_not_paired() -> None:
    assert choose(LONG, [worker(1, Role.PREFILL, backend="sim"), worker(2)]) == (None, 2)
    assert choose(LONG, [worker(1, Role.PREFILL, backend=""), worker(2, backend="")]) == (None, 2)


def test_a_failed_prefill_leg_is_not_tried_again() -> None:
    request = Request(model="m", prompt_tokens=1000, block_size_tokens=10, prompt=Prompt.LOCAL)
    assert choose(request, [worker(1, Role.PREFILL), worker(2)]) == (None, 2)


def test_a_prompt_computed_elsewhere_is_not_charged_to_the_decode_worker() -> None:
    request = Request(model="m", prompt_tokens=1000, block_size_tokens=10, prompt=Prompt.COMPUTED)
    decision = decide(request, [worker(1)], {}, POLICY, Random(0))
    assert decision is not None
    assert decision.decode.new_prefill_tokens == 0
    assert decision.decode.booking == Booking(prefill_tokens=0, kv_blocks=100)


def test_a_computed_prompt_goes_to_who_can_pull_it_while_there_is_one() -> None:
    request = replace(LONG, prompt=Prompt.COMPUTED, transfer_backend="nixl")
    able, unable = worker(1, active=500), worker(2, backend="sim")
    assert choose(request, [able, unable]) == (None, 1)
    assert choose(request, [unable]) == (None, 2)


def test_excluded_lost_and_foreign_workers_are_left_out() -> None:
    gone = worker(2)
    gone.is_available = False
    workers = [worker(1), gone, worker(3, model="other")]
    request = Request(
        model="m", prompt_tokens=10, block_size_tokens=10, excluded=frozenset({InstanceId(1)})
    )
    assert choose(request, workers) == (None, None)


def test_overlaps_in_another_block_size_count_as_nothing() -> None:
    workers = [worker(1, block_size=20, queued=10), worker(2, block_size=20)]
    assert choose(SHORT, workers, {InstanceId(1): 10}) == (None, 2)


def test_equal_costs_are_decided_by_lot() -> None:
    workers = [worker(number) for number in range(4)]
    assert {choose(SHORT, workers, seed=seed)[1] for seed in range(50)} == {0, 1, 2, 3}


def test_a_burst_is_spread_by_bookings() -> None:
    workers = [worker(number) for number in range(4)]
    chosen = []
    for seed in range(8):
        decision = decide(SHORT, workers, {}, POLICY, Random(seed))
        assert decision is not None
        decision.decode.worker.book(decision.decode.booking)
        chosen.append(decision.decode.worker.instance_id)
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_gives_dearer_workers_a_chance() -> None:
    workers = [worker(1), worker(2, active=10)]
    policy = Policy(temperature=1.0)
    chosen = [_numbers(decide(SHORT, workers, {}, policy, Random(seed)))[1] for seed in range(300)]
    assert 1 > chosen.count(2) / len(chosen) > 0.1
    assert chosen.count(1) > chosen.count(2)


def test_a_decision_says_why_the_prompt_is_computed_where_it_is() -> None:
    workers = [worker(1, Role.PREFILL), worker(2)]

    def why(request: Request, workers: list[Worker], overlap: int = 0) -> Handover:
        decision = decide(request, workers, {InstanceId(2): overlap}, POLICY, Random(0))
        assert decision is not None
        return decision.handover

    assert why(LONG, workers) is Handover.REMOTE
    assert why(SHORT, workers) is Handover.SHORT
    assert why(LONG, workers[1:]) is Handover.NO_PREFILL_WORKER
    longer = replace(LONG, prompt_tokens=10_000)
    assert why(longer, workers, 800) is Handover.HELD
    assert why(replace(LONG, prompt=Prompt.LOCAL), workers) is Handover.LOCAL
    assert why(replace(LONG, prompt=Prompt.COMPUTED), workers) is Handover.COMPUTED


def test_a_prompt_that_the_decode_worker_has_in_host_memory_is_not_handed_over() -> None:
    workers = [worker(1), worker(2, Role.PREFILL)]
    held = {InstanceId(1): TieredOverlap(device_blocks=20, host_blocks=60)}
    decision = decide(replace(LONG, prompt_tokens=1_000), workers, held, POLICY, Random(0))
    assert decision is not None
    # 200 tokens to compute, and what loading 600 costs: more than would be worth a handover.
    assert decision.whole.new_prefill_tokens == 200 + 150
    assert decision.handover is Handover.HELD
    # What is to be loaded needs room on the device.
    assert decision.whole.new_kv_blocks == 80


def test_a_decision_says_why_the_worker_won() -> None:
    def why(workers: list[Worker], policy: Policy = POLICY, **options: Any) -> Pick:
        decision = decide(replace(SHORT, **options), workers, {}, policy, Random(0))
        assert decision is not None
        return decision.decode_pick

    dear = worker(2, active=10)
    assert why([worker(1), dear]) is Pick.LOWEST
    assert why([worker(1), worker(2)]) is Pick.TIE
    assert why([worker(1), dear], Policy(temperature=0.1)) is Pick.DRAWN
    assert why([worker(1), dear], pinned={Role.DECODE: InstanceId(2)}) is Pick.PINNED


def test_a_pinned_worker_wins_whatever_it_costs() -> None:
    workers = [worker(1, Role.PREFILL), worker(2), worker(3, queued=5000, active=500)]
    pinned = {Role.DECODE: InstanceId(3)}
    assert choose(replace(SHORT, pinned=pinned), workers) == (None, 3)
    assert choose(replace(LONG, pinned=pinned), workers) == (1, 3)


def test_a_pinned_prefill_worker_gets_even_a_short_prompt() -> None:
    workers = [worker(1, Role.PREFILL, queued=5000), worker(2, Role.PREFILL), worker(3)]
    assert choose(replace(SHORT, pinned={Role.PREFILL: InstanceId(1)}), workers) == (1, 3)


def test_a_pinned_worker_that_cannot_serve_leaves_nobody() -> None:
    gone = worker(3)
    gone.is_available = False
    workers = [worker(1, Role.PREFILL, backend="sim"), worker(2), gone]
    for pinned in ({Role.DECODE: InstanceId(3)}, {Role.PREFILL: InstanceId(1)}):
        assert choose(replace(LONG, pinned=pinned), workers) == (None, None)


fleets = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 500), st.integers(0, 60), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(fleets, st.integers(1, 500), st.integers(0, 1000))
def test_the_winner_is_the_cheapest_by_the_formula(
    fleet: list[tuple[int, int, int, bool]], prompt_tokens: int, seed: int
) -> None:
    workers = []
    overlaps: dict[InstanceId, int] = {}
    costs = {}
    for number, (queued, active, overlap, is_there) in enumerate(fleet, start=1):
        made = worker(number, queued=queued, active=active)
        made.is_available = is_there
        held = min(overlap, prompt_tokens // 10)
        workers.append(made)
        overlaps[InstanceId(number)] = held
        if is_there:
            prefill = queued + max(1, prompt_tokens - held * 10)
            costs[number] = prefill + (active + math.ceil(prompt_tokens / 10) - held) * 10
    request = Request(model="m", prompt_tokens=prompt_tokens, block_size_tokens=10)
    decision = decide(request, workers, overlaps, POLICY, Random(seed))
    if not costs:
        assert decision is None
        return
    assert decision is not None
    assert decision.decode.cost == min(costs.values())
    assert costs[decision.decode.worker.instance_id] == decision.decode.cost
    assert [c.cost for c in decision.decode_candidates] == sorted(costs.values())


def full(number: int, **load: int) -> Worker:
    made = worker(number)
    made.load = Load(running_requests=1, total_kv_blocks=100, **load)
    return made


def test_a_dearer_worker_with_room_goes_before_a_cheaper_one_without() -> None:
    holder, roomy = full(1, active_kv_blocks=97), full(2, active_kv_blocks=88)
    decision = decide(SHORT, [holder, roomy], {InstanceId(1): 6}, Policy(), Random(0))
    assert decision is not None
    assert decision.decode.cost > decision.decode_candidates[0].cost
    assert (decision.decode.worker, decision.decode_pick) == (roomy, Pick.ROOM)
    assert decision.whole.worker is holder


def test_prompts_that_wait_at_a_worker_take_its_room() -> None:
    workers = [full(1, active_kv_blocks=80, queued_prefill_tokens=100)]
    fits = decide(SHORT, workers, {}, POLICY, Random(0))
    assert fits is not None
    assert fits.has_room
    workers[0].load = workers[0].load._replace(queued_prefill_tokens=101)
    decision = decide(SHORT, workers, {}, POLICY, Random(0))
    assert decision is not None
    assert not decision.has_room
    assert workers[0].free_kv_tokens == 99


def test_room_is_not_asked_of_an_idle_or_a_pinned_worker_or_for_another_policy() -> None:
    idle = worker(1)
    idle.load = Load(total_kv_blocks=5)
    assert _has_room(SHORT, [idle], POLICY)
    busy = [full(1, active_kv_blocks=100)]
    assert not _has_room(SHORT, busy, POLICY)
    assert _has_room(replace(SHORT, pinned={Role.DECODE: InstanceId(1)}), busy, POLICY)
    assert _has_room(SHORT, busy, replace(POLICY, decode_policy="least-load"))


def _has_room(request: Request, workers: list[Worker], policy: Policy) -> bool:
    decision = decide(request, workers, {}, policy, Random(0))
    assert decision is not None
    return decision.has_room


def test_room_is_asked_once_a_prefill_worker_has_computed_the_prompt_and_not_before() -> None:
    workers = [worker(1, Role.PREFILL), full(2, active_kv_blocks=100)]
    workers[1].transfer_backend = "nixl"
    assert _has_room(LONG, workers, POLICY)
    later = replace(LONG, prompt=Prompt.COMPUTED, transfer_backend="nixl")
    assert not _has_room(later, workers, POLICY)
