from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common import hashing
from libs.common.errors import ContextTooLong, InvalidRequest, TransferFailed
from libs.engine.interface import (
    EngineBlocksStored,
    EngineRequest,
    FinishReason,
    KvSession,
    Language,
    Leg,
    LogprobOptions,
    OutputConstraint,
    RequestKey,
)
from libs.engine.sim.core.pool import engine_hash
from libs.engine.sim.core.scheduler import Scheduler
from libs.engine.sim.core.timing import StepWork
from libs.engine.sim.core.tokens import TokenSource
from tests.libs.engine.sim.core.driving import (
    BLOCK_SIZE_TOKENS,
    LEASE_SECONDS,
    SOURCE,
    Drive,
    expected_tokens,
    limits,
    noting,
    request,
    run,
    scheduler,
)

prompts = st.lists(st.integers(0, 50_000), min_size=1, max_size=40)


# Tokens


@given(prompts, st.integers(1, 30), st.none() | st.integers(0, 2**64 - 1))
def test_tokens_are_a_function_of_all_tokens_before_them(
    prompt: list[int], count: int, seed: int | None
) -> None:
    asked = request(1, prompt, max_tokens=count, seed=seed)
    assert run(asked).tokens[1] == expected_tokens(asked, count)


@given(prompts, st.integers(1, 30), st.integers(1, 30))
def test_a_request_that_goes_on_elsewhere_goes_on_with_the_same_tokens(
    prompt: list[int], before: int, after: int
) -> None:
    whole = run(request(1, prompt, max_tokens=before + after)).tokens[1]
    moved = run(request(1, prompt + whole[:before], max_tokens=after)).tokens[1]
    assert moved == whole[before:]


def test_a_bias_forces_a_token() -> None:
    assert run(request(1, [1], max_tokens=3, logit_bias={9: 100.0})).tokens[1] == [9, 9, 9]


def test_a_constraint_is_refused() -> None:
    constraint = OutputConstraint(Language.REGEX, "a+")
    finish = run(request(1, [1], constraint=constraint)).finishes[1]
    assert isinstance(finish.error, InvalidRequest)
    assert finish.error.param == "constraint"


@given(prompts, st.integers(1, 12), st.integers(0, 3))
def test_log_probabilities_of_output_are_those_of_the_same_tokens_as_a_prompt(
    prompt: list[int], count: int, alternatives: int
) -> None:
    both = LogprobOptions(alternatives, alternatives)
    first = run(request(1, prompt, max_tokens=count, logprobs=both))
    again = run(request(2, prompt + first.tokens[1], logprobs=both)).prompt_logprobs[2]
    columns = [first.prompt_logprobs[1], *first.logprobs[1]]
    assert again.token_ids == [token for found in columns for token in found.token_ids]
    assert again.logprobs == [value for found in columns for value in found.logprobs]
    assert len(first.logprobs[1]) == count


def test_who_asks_for_no_log_probabilities_gets_none() -> None:
    outcome = run(request(1, [1], max_tokens=4))
    assert not outcome.logprobs
    assert not outcome.prompt_logprobs


def test_waiting_requests_are_admitted_by_priority_then_in_order() -> None:
    drive = Drive(scheduler(max_running_requests=1))
    drive.submit(
        request(1, [1], priority=0),
        request(2, [2], priority=1),
        request(3, [3], priority=-1),
        request(4, [4], priority=-1),
    )
    assert list(drive.run().finishes) == [3, 4, 1, 2]


def test_the_last_priority_gives_up_its_blocks_first() -> None:
    """Room for one of both outputs: the older one is worth less and starts again."""
    drive = Drive(scheduler(total_kv_blocks=4))
    drive.submit(
        request(1, [1, 2, 3], max_tokens=9, priority=5), request(2, [4, 5, 6], max_tokens=9)
    )
    assert list(drive.run().finishes) == [2, 1]
    assert drive.scheduler.preemptions


def test_seeds_change_the_output() -> None:
    outcome = run(*(request(key, [1], max_tokens=8, seed=key) for key in (1, 2)))
    assert outcome.tokens[1] != outcome.tokens[2]


def test_the_chunk_size_does_not_change_the_output() -> None:
    asked = request(1, range(100), max_tokens=10)
    assert run(asked, chunk_tokens=16).tokens == run(asked, chunk_tokens=512).tokens


# Ends


def test_a_sequence_ends_by_length_at_max_tokens() -> None:
    outcome = run(request(1, range(10), max_tokens=7))
    assert len(outcome.tokens[1]) == 7
    assert outcome.finishes[1].reason is FinishReason.LENGTH


def test_a_sequence_ends_by_length_when_the_context_is_full() -> None:
    outcome = run(request(1, range(10), max_tokens=100), context_length_tokens=25)
    assert len(outcome.tokens[1]) == 15
    assert outcome.finishes[1].reason is FinishReason.LENGTH


def test_a_sequence_ends_by_length_when_it_fills_the_whole_cache() -> None:
    outcome = run(request(1, range(10), max_tokens=100), total_kv_blocks=5)
    # 20 slots, and a last token that needs none.
    assert len(outcome.tokens[1]) == 11
    assert outcome.finishes[1].reason is FinishReason.LENGTH


@pytest.mark.parametrize("changes", [{"total_kv_blocks": 2}, {"context_length_tokens": 9}])
def test_a_prompt_that_can_never_fit_is_refused_at_once(changes: dict[str, Any]) -> None:
    outcome = run(request(1, range(9)), request(2, range(8)), **changes)
    assert outcome.finishes[1].reason is FinishReason.ERROR
    assert isinstance(outcome.finishes[1].error, ContextTooLong)
    assert outcome.finishes[2].reason is FinishReason.LENGTH


def test_a_refused_request_that_is_cancelled_is_never_heard_of() -> None:
    drive = Drive(scheduler(total_kv_blocks=2))
    drive.submit(request(1, range(9)))
    drive.scheduler.cancel(RequestKey(1))
    assert drive.run().finishes == {}


def test_a_stop_token_ends_the_sequence_and_is_its_last_token() -> None:
    asked = request(1, range(10), max_tokens=20)
    stop = expected_tokens(asked, 20)[4]
    outcome = run(msgspec.structs.replace(asked, stop_token_ids=(stop,), ignore_eos=True))
    assert outcome.tokens[1] == expected_tokens(asked, 20)[:5]
    assert outcome.finishes[1].reason is FinishReason.STOP


def test_a_stop_token_is_not_drawn_before_min_tokens() -> None:
    asked = request(1, range(10), max_tokens=20)
    stop = expected_tokens(asked, 20)[4]
    outcome = run(msgspec.structs.replace(asked, stop_token_ids=(stop,), min_tokens=5))
    assert outcome.tokens[1][:4] == expected_tokens(asked, 4)
    assert stop not in outcome.tokens[1][:5]


def test_the_end_of_sequence_token_ends_it_unless_ignored() -> None:
    source = TokenSource(range(100), eos_token_id=100, eos_probability=0.2)
    asked = request(1, range(10), max_tokens=100)
    ended = run(asked, source=source)
    assert ended.finishes[1].reason is FinishReason.STOP
    assert ended.tokens[1].index(100) == len(ended.tokens[1]) - 1
    ignored = run(msgspec.structs.replace(asked, ignore_eos=True), source=source)
    assert ignored.finishes[1].reason is FinishReason.LENGTH
    assert ignored.tokens[1][: len(ended.tokens[1])] == ended.tokens[1]


# Batching


def works_of(*requests: EngineRequest, **changes: int) -> list[StepWork]:
    works: list[StepWork] = []
    drive = Drive(Scheduler(limits(**changes), noting(works), SOURCE, engine_id="sim"))
    drive.submit(*requests)
    drive.run()
    return works


def test_long_prompts_are_computed_in_chunks_that_share_a_step_with_decoding() -> None:
    works = works_of(
        request(1, [1], max_tokens=4), request(2, range(50), max_tokens=1), chunk_tokens=20
    )
    assert [(each.prefill_tokens, each.decoding_sequences) for each in works] == [
        (20, 0),
        (19, 1),
        (12, 1),
        (0, 1),
    ]


def test_decoding_reads_the_kv_of_each_sequence_and_not_of_prompts_under_way() -> None:
    """As in Dynamo's mocker: what two share is read twice."""
    works = works_of(
        request(1, range(20), max_tokens=9),
        request(2, range(20), max_tokens=9),
        request(3, range(100, 200), max_tokens=1),
        chunk_tokens=42,
        total_kv_blocks=40,
    )
    room = 40 * limits().block_size_tokens
    read = [round(each.kv_usage * room) for each in works[:4]]
    # 40 of the third one's 100 tokens are computed in each of the next steps.
    assert read == [0, 21 + 21, 22 + 22, 23 + 23]
    assert [each.prefill_tokens for each in works[:4]] == [42, 40, 40, 18]


def test_kv_that_is_read_more_than_once_counts_as_all_at_most() -> None:
    works = works_of(
        *(request(key, range(40), max_tokens=3) for key in range(1, 5)), total_kv_blocks=14
    )
    assert max(each.kv_usage for each in works) == 1.0


def test_requests_are_admitted_in_order_up_to_the_limit() -> None:
    drive = Drive(scheduler(max_running_requests=2))
    drive.submit(*(request(key, [key], max_tokens=3) for key in (1, 2, 3)))
    drive.step()
    assert set(drive.outcome.starts) == {1, 2}
    load = drive.scheduler.load()
    assert (load.running_requests, load.waiting_requests) == (2, 1)
    assert len(drive.run().finishes) == 3


def test_load_counts_prompt_tokens_until_they_are_computed() -> None:
    drive = Drive(scheduler(chunk_tokens=16))
    drive.submit(request(1, range(40), max_tokens=2))
    seen = [drive.scheduler.load().queued_prefill_tokens]
    while drive.step():
        seen.append(drive.scheduler.load().queued_prefill_tokens)
    assert seen == [40, 24, 8, 0, 0]


def test_load_counts_the_blocks_of_sequences_in_progress_only() -> None:
    drive = Drive(scheduler())
    drive.submit(request(1, range(10), max_tokens=2))
    drive.step()
    assert drive.scheduler.load().active_kv_blocks == 3
    drive.run()
    assert drive.scheduler.load().active_kv_blocks == 0


def test_the_youngest_gives_way_when_blocks_run_out_and_produces_the_same_tokens() -> None:
    asked = [request(key, range(key * 100, key * 100 + 8), max_tokens=30) for key in (1, 2, 3)]
    drive = Drive(scheduler(total_kv_blocks=12))
    drive.submit(*asked)
    outcome = drive.run()
    assert drive.scheduler.preemptions > 0
    assert list(outcome.finishes) == [1, 2, 3]
    for each in asked:
        assert outcome.tokens[each.key] == expected_tokens(each, 30)


# Prefix reuse


def test_a_repeated_prompt_is_cached_but_for_its_last_block() -> None:
    outcome = run(request(1, range(40)), chunk_tokens=64, max_running_requests=1)
    assert outcome.starts[1].cached_tokens == 0
    drive = Drive(scheduler(max_running_requests=1))
    drive.submit(*(request(key, range(40)) for key in (1, 2)), request(3, range(42)))
    outcome = drive.run()
    assert [outcome.starts[key].cached_tokens for key in (1, 2, 3)] == [0, 36, 40]


def test_another_cache_salt_shares_nothing() -> None:
    outcome = run(
        request(1, range(40), cache_salt="a"),
        request(2, range(40), cache_salt="b"),
        max_running_requests=1,
    )
    assert outcome.starts[2].cached_tokens == 0


def test_produced_blocks_are_reused_too() -> None:
    first = request(1, range(10), max_tokens=20)
    output = expected_tokens(first, 20)
    outcome = run(first, request(2, [*range(10), *output]), max_running_requests=1)
    # The last token of the first request was drawn, but never computed on.
    assert outcome.starts[2].cached_tokens == 28


def test_two_of_the_same_prompt_at_once_end_up_with_one_copy() -> None:
    drive = Drive(scheduler())
    drive.submit(*(request(key, range(16), max_tokens=2) for key in (1, 2)))
    drive.step()
    # Four blocks of the prompt; the first decode step will need one more each.
    assert drive.scheduler.load().active_kv_blocks == 4
    drive.run()


def test_full_blocks_are_reported_with_their_tokens_parent_and_salt() -> None:
    drive = Drive(scheduler())
    asked = request(1, range(8), max_tokens=6, cache_salt="tenant")
    drive.submit(asked)
    output = drive.run().tokens[1]
    tokens = [*range(8), *output]
    sequence_hashes = hashing.sequence_hashes(tokens, BLOCK_SIZE_TOKENS, cache_salt="tenant")
    hashes = list(map(engine_hash, sequence_hashes))
    assert drive.events == [
        EngineBlocksStored((hashes[0], hashes[1]), None, tokens[:8], "", "tenant"),
        EngineBlocksStored((hashes[2],), hashes[1], tokens[8:12], "", "tenant"),
    ]
    stored = [event for event in drive.events if isinstance(event, EngineBlocksStored)]
    assert [list(event.sequence_hashes or ()) for event in stored] == [
        sequence_hashes[:2],
        sequence_hashes[2:],
    ]


# Disaggregation


def prefill(drive: Drive, prompt: range, key: int = 1) -> KvSession:
    drive.submit(request(key, prompt, leg=Leg.PREFILL))
    return drive.run().prefilled[key].kv_session


def test_a_prefill_leg_keeps_its_blocks_until_they_are_pulled() -> None:
    drive = Drive(scheduler())
    session = prefill(drive, range(10))
    assert session.tokens == 10
    assert session.time_to_live_seconds == LEASE_SECONDS
    assert drive.scheduler.load().active_kv_blocks == 3
    assert drive.scheduler.offer(session.session_id, session.last_sequence_hash, drive.now, 5) == 3
    drive.scheduler.release(session.session_id, drive.now)
    assert drive.scheduler.load().active_kv_blocks == 0
    with pytest.raises(TransferFailed, match="unknown"):
        drive.scheduler.release(session.session_id, drive.now)


def test_kept_blocks_are_freed_when_the_lease_is_over() -> None:
    drive = Drive(scheduler())
    session = prefill(drive, range(10))
    assert drive.scheduler.next_expiry == drive.now + LEASE_SECONDS
    drive.now += LEASE_SECONDS
    with pytest.raises(TransferFailed, match="expired"):
        drive.scheduler.offer(session.session_id, session.last_sequence_hash, drive.now, 5)
    drive.step()
    assert drive.scheduler.load().active_kv_blocks == 0
    assert drive.scheduler.next_expiry is None


def test_an_offer_keeps_the_blocks_for_the_length_of_a_transfer() -> None:
    drive = Drive(scheduler())
    session = prefill(drive, range(10))
    drive.now += LEASE_SECONDS - 1
    drive.scheduler.offer(session.session_id, session.last_sequence_hash, drive.now, 5)
    drive.now += 4
    drive.step()
    drive.scheduler.release(session.session_id, drive.now)


def test_kept_blocks_are_refused_to_another_prompt() -> None:
    drive = Drive(scheduler())
    session = prefill(drive, range(10))
    with pytest.raises(TransferFailed, match="another prompt"):
        drive.scheduler.offer(session.session_id, session.last_sequence_hash + 1, drive.now, 5)


def test_cancelling_a_prefill_leg_frees_what_is_kept() -> None:
    drive = Drive(scheduler())
    session = prefill(drive, range(10))
    drive.scheduler.cancel(RequestKey(1))
    assert drive.scheduler.load().active_kv_blocks == 0
    with pytest.raises(TransferFailed, match="unknown"):
        drive.scheduler.offer(session.session_id, session.last_sequence_hash, drive.now, 5)


def decode(drive: Drive, session: KvSession, prompt: range, key: int = 2) -> EngineRequest:
    asked = request(key, prompt, leg=Leg.DECODE, kv_session=session, max_tokens=8)
    drive.submit(asked)
    return asked


def test_a_pulled_prompt_needs_one_step_for_its_last_token() -> None:
    session = prefill(Drive(scheduler()), range(100))
    drive = Drive(scheduler())
    asked = decode(drive, session, range(100))
    assert not drive.step()
    (pull,) = drive.scheduler.take_pulls()
    assert (pull.key, pull.missing_blocks) == (asked.key, 25)
    drive.scheduler.pulled(pull.key)
    drive.step()
    start = drive.outcome.starts[2]
    assert (start.cached_tokens, start.transferred_tokens) == (0, 99)
    assert drive.run().tokens[2] == expected_tokens(asked, 8)


def test_only_blocks_that_are_not_cached_are_pulled() -> None:
    session = prefill(Drive(scheduler()), range(100))
    drive = Drive(scheduler())
    drive.submit(request(1, range(50)))
    drive.run()
    decode(drive, session, range(100))
    drive.step()
    (pull,) = drive.scheduler.take_pulls()
    assert pull.missing_blocks == 13
    drive.scheduler.pulled(pull.key)
    drive.run()
    start = drive.outcome.starts[2]
    assert (start.cached_tokens, start.transferred_tokens) == (48, 51)


def test_a_failed_pull_is_counted_and_the_prompt_computed() -> None:
    session = prefill(Drive(scheduler()), range(100))
    drive = Drive(scheduler())
    asked = decode(drive, session, range(100))
    drive.step()
    drive.scheduler.pull_failed(drive.scheduler.take_pulls()[0].key)
    outcome = drive.run()
    assert outcome.starts[2].transferred_tokens == 0
    assert outcome.tokens[2] == expected_tokens(asked, 8)
    assert drive.scheduler.transfer_failures == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"last_sequence_hash": 1},
        {"tokens": 99},
        {"transfer_backend": "nixl"},
        {"endpoints": ()},
        {"time_to_live_seconds": 0.0},
    ],
)
def test_what_cannot_be_pulled_is_not_asked_for(changes: dict[str, Any]) -> None:
    session = replace(prefill(Drive(scheduler()), range(100)), **changes)
    drive = Drive(scheduler())
    asked = decode(drive, session, range(100))
    assert drive.run().tokens[2] == expected_tokens(asked, 8)
    assert drive.scheduler.take_pulls() == []
    assert drive.scheduler.transfer_failures == 1


def test_time_spent_waiting_for_room_counts_towards_the_session_s_time_to_live() -> None:
    session = prefill(Drive(scheduler()), range(100))
    drive = Drive(scheduler(max_running_requests=1))
    drive.submit(request(1, [1], max_tokens=40))
    decode(drive, session, range(100))
    drive.run()
    assert drive.outcome.starts[2].transferred_tokens == 0


def test_a_pull_that_ends_after_its_request_was_cancelled_is_ignored() -> None:
    session = prefill(Drive(scheduler()), range(100))
    drive = Drive(scheduler())
    for key in (2, 3):
        decode(drive, session, range(100), key)
    drive.step()
    first, second = drive.scheduler.take_pulls()
    drive.scheduler.cancel(first.key)
    drive.scheduler.cancel(second.key)
    drive.scheduler.pulled(first.key)
    drive.scheduler.pull_failed(second.key)
    assert not drive.run().starts
    assert drive.scheduler.load().active_kv_blocks == 0
    assert drive.scheduler.transfer_failures == 0


# Many


def test_a_thousand_engines_fit_in_one_process() -> None:
    drives = [Drive(scheduler()) for _ in range(1_000)]
    for key, drive in enumerate(drives):
        drive.submit(request(key, [key, 1], max_tokens=3))
    assert all(len(drive.run().finishes) == 1 for drive in drives)
