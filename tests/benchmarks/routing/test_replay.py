"""Traces on simulated workers: the router's decisions as they play out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from benchmarks.routing import synthetic, trace
from benchmarks.routing.replay import Outcome, Replay, Terms
from benchmarks.routing.results import Row, Served, summary
from benchmarks.routing.trace import Arrival
from services.router.core.decision import Policy
from services.router.core.workers import InstanceId

CONVERSATIONS = 40


def conversations(
    requests: int, *, every_seconds: float, burst: int = 4, seed: int = 0
) -> list[Arrival]:
    """Conversations that go on: each prompt is an earlier one of its own and some more, and all
    begin with one block in common. So many at a time arrive at the same moment."""
    random = Random(seed)
    blocks: dict[int, list[int]] = {}
    arrivals = []
    fresh = 1
    for number in range(requests):
        said = blocks.setdefault(random.randrange(CONVERSATIONS), [0])
        added = random.randint(1, 8)
        said += range(fresh, fresh + added)
        fresh += added
        arrivals.append(
            Arrival(
                at_seconds=number // burst * burst * every_seconds,
                prompt_tokens=len(said) * trace.TRACE_BLOCK_TOKENS - random.randrange(500),
                output_tokens=random.randint(1, 120),
                block_ids=tuple(said),
            )
        )
    return arrivals


def served(outcomes: list[Outcome]) -> list[Served]:
    return [
        Served(
            prompt_tokens=one.arrival.prompt_tokens,
            cached_tokens=one.cached_tokens,
            ttft_seconds=one.ttft_seconds,
            itl_seconds=one.itl_seconds,
        )
        for one in outcomes
    ]


def test_kv_meets_the_goal_more_often_than_round_robin_and_reuses_more() -> None:
    arrivals = conversations(300, every_seconds=0.08)
    runs = {}
    for policy in ("kv", "round-robin"):
        outcomes = Replay(arrivals, Policy(decode_policy=policy), Terms(workers=4)).run()
        row = Row(workers=4, speed_up=1)
        runs[policy] = summary(row, "switchgear", policy, served(outcomes), wall_seconds=0.0)
    kv, round_robin = runs["kv"], runs["round-robin"]
    assert kv.reuse > 1.2 * round_robin.reuse
    assert kv.met_goal > round_robin.met_goal
    assert kv.ttft_p90_seconds < round_robin.ttft_p90_seconds


def test_a_replay_comes_out_the_same_every_time() -> None:
    arrivals = conversations(60, every_seconds=0.05)
    first, second = (served(Replay(arrivals, Policy(), Terms(workers=3)).run()) for _ in range(2))
    assert first == second
    assert len(first) == 60


def test_predictions_come_true() -> None:
    """With room for everything, whatever is thought to be held is found. Only prompts of one step
    do not share what is new to both."""
    arrivals = conversations(120, every_seconds=0.3, burst=1)
    outcomes = Replay(arrivals, Policy(), Terms(workers=3, kv_blocks=200_000)).run()
    assert any(outcome.predicted_cached_tokens for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.cached_tokens >= outcome.predicted_cached_tokens - 16


def test_a_hot_system_prompt_loads_none_of_a_thousand_workers_by_half_above_the_mean() -> None:
    """Requests come faster than they end: some 6 of them for each worker."""
    random = Random(0)
    system_prompt = (0, 1)
    arrivals = [
        Arrival(
            at_seconds=number / 20_000,
            prompt_tokens=2 * trace.TRACE_BLOCK_TOKENS + random.randint(1, 200),
            output_tokens=random.randint(24, 48),
            block_ids=(*system_prompt, number + 2),
        )
        for number in range(6_000)
    ]
    terms = Terms(workers=1_000)
    outcomes = Replay(arrivals, Policy(), terms).run()
    requests = Counter(outcome.worker for outcome in outcomes)
    tokens = Counter[InstanceId | None]()
    for outcome in outcomes:
        tokens[outcome.worker] += outcome.arrival.prompt_tokens + outcome.arrival.output_tokens
    for load in (requests, tokens):
        assert max(load.values()) <= 1.5 * sum(load.values()) / terms.workers


def test_prompts_are_computed_by_prefill_workers_and_go_on_where_they_are_pulled_to() -> None:
    arrivals = conversations(120, every_seconds=0.2)
    outcomes = Replay(arrivals, Policy(), Terms(workers=2, prefill_workers=2)).run()
    assert {outcome.worker for outcome in outcomes} == {1, 2}
    assert all(outcome.last_token_at >= outcome.first_token_at > 0 for outcome in outcomes)
    assert any(outcome.cached_tokens for outcome in outcomes)
    # Short rests of prompts are computed where their tokens are produced.
    assert {outcome.prefill_worker for outcome in outcomes} == {None, 3, 4}


def test_a_prefill_worker_full_of_kv_goes_on_once_that_is_pulled() -> None:
    """Nobody else arrives then to set it going."""
    arrivals = [Arrival(0.0, 1_000, 50, (2 * number, 2 * number + 1)) for number in range(6)]
    terms = Terms(workers=1, prefill_workers=1, kv_blocks=100)
    outcomes = Replay(arrivals, Policy(), terms).run()
    assert [outcome.prefill_worker for outcome in outcomes] == [2] * 6
    assert all(outcome.last_token_at > outcome.first_token_at > 0 for outcome in outcomes)


def test_a_small_request_overtakes_a_large_one_that_nobody_has_room_for() -> None:
    arrivals = [
        Arrival(0.0, 1_000, 400, (0, 1)),
        Arrival(0.1, 1_000, 10, (2, 3)),
        Arrival(0.2, 100, 10, (4,)),
    ]
    terms = Terms(workers=1, kv_blocks=100)
    first, large, small = Replay(arrivals, Policy(), terms).run()
    assert small.last_token_at < first.last_token_at < large.first_token_at
    # At the worker it would wait behind the large one.
    terms = Terms(workers=1, kv_blocks=100, max_held_seconds=0.0)
    first, large, small = Replay(arrivals, Policy(), terms).run()
    assert first.last_token_at < large.first_token_at <= small.first_token_at


def test_three_routers_that_learn_of_loads_late_find_as_much_cached_as_one() -> None:
    arrivals = synthetic.conversations(100, seed=0)
    reuse = {}
    for routers in (1, 3):
        terms = Terms(workers=4, routers=routers, load_lag_seconds=0.05)
        run = served(Replay(arrivals, Policy(), terms).run())
        prompt_tokens = sum(one.prompt_tokens for one in run)
        reuse[routers] = sum(one.cached_tokens for one in run) / prompt_tokens
    assert reuse[1] > 0.7
    assert reuse[3] > reuse[1] - 0.01


def test_a_router_learns_of_another_ones_request_before_the_step_with_it_ends() -> None:
    """A prompt of 8,000 tokens takes 165 ms; the second request comes after 20."""
    prompt = tuple(range(16))
    arrivals = [Arrival(0.0, 8_000, 2, prompt), Arrival(0.02, 8_000, 2, prompt[::-1])]
    for seed in range(10):
        terms = Terms(workers=2, routers=2, seed=seed)
        first, second = Replay(arrivals, Policy(), terms).run()
        assert first.worker != second.worker


def test_requests_that_a_full_worker_refuses_are_misses() -> None:
    arrivals = conversations(40, every_seconds=0)
    terms = Terms(workers=2, max_waiting_requests=5)
    outcomes = Replay(arrivals, Policy(), terms).run()
    taken = [outcome for outcome in outcomes if not outcome.is_refused]
    refused = len(outcomes) - len(taken)
    assert len(outcomes) == 40
    assert 0 < refused < 40
    run = summary(Row(workers=2, speed_up=1), "s", "kv", served(taken), 0.0, refused)
    assert (run.requests, run.refused) == (40, refused)
    assert run.met_goal <= len(taken)


def test_made_up_conversations_are_the_same_for_a_seed_and_go_on_from_what_was_said() -> None:
    arrivals = synthetic.conversations(50, seed=3)
    assert arrivals == synthetic.conversations(50, seed=3)
    assert arrivals != synthetic.conversations(50, seed=4)
    blocks = [arrival.block_ids for arrival in arrivals]
    assert any(one != other and one == other[: len(one)] for one in blocks for other in blocks)
    for arrival in arrivals:
        room = len(arrival.block_ids) * trace.TRACE_BLOCK_TOKENS
        assert room - trace.TRACE_BLOCK_TOKENS < arrival.prompt_tokens <= room


def test_a_trace_of_azure_has_lengths_and_nothing_in_common(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,600,109\n"
    )
    first, second = trace.read_azure(path)
    assert first == Arrival(0.0, 374, 44, (0,))
    assert second.at_seconds == pytest.approx(4.314579)
    assert (second.prompt_tokens, second.output_tokens) == (600, 109)
    assert second.block_ids == (1, 2)
    path.write_text(path.read_text() + "never,1,1\n")
    with pytest.raises(trace.TraceError, match=r"azure\.csv:4: "):
        trace.read_azure(path)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrivals = conversations(20, every_seconds=0.25)
    trace.write(tmp_path / "trace.jsonl", arrivals)
    assert trace.read(tmp_path / "trace.jsonl") == arrivals
    faster = trace.read(tmp_path / "trace.jsonl", speed_up=2, requests=5)
    assert [one.at_seconds for one in faster] == [one.at_seconds / 2 for one in arrivals[:5]]


def test_arrivals_are_spread_over_the_seconds_after_their_recorded_times() -> None:
    arrivals = conversations(40, every_seconds=1, burst=8)
    spread = trace.spread(arrivals, 3, seed=0)
    assert spread == trace.spread(arrivals, 3, seed=0)
    times = [one.at_seconds for one in spread]
    assert times == sorted(set(times))
    recorded = {one.block_ids: one for one in arrivals}
    assert len(recorded) == len(spread)
    for one in spread:
        before = recorded[one.block_ids]
        assert 0 <= one.at_seconds - before.at_seconds < 3
        assert replace(one, at_seconds=before.at_seconds) == before


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "{}",
        '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
    ],
)
def test_a_trace_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    trace.write(path, conversations(1, every_seconds=1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(trace.TraceError, match=r"trace\.jsonl:2: "):
        trace.read(path)


def test_prompts_share_what_their_blocks_share() -> None:
    one, other = trace.with_system_prompt(conversations(2, every_seconds=1), blocks=2)
    shared = 3 * trace.TRACE_BLOCK_TOKENS
    assert one.prompt()[:shared] == other.prompt()[:shared]
    assert len(one.prompt()) == one.prompt_tokens
