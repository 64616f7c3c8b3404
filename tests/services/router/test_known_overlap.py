from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from libs.common.hashing import chain
from services.router.core.candidates import TieredOverlap
from services.router.core.estimated_holdings import EstimatedHoldings
from services.router.core.known_overlap import KV_EVENT_SECONDS, KnownOverlap
from services.router.core.predicted_overlap import STRIDE_BLOCKS
from services.router.core.workers import InstanceId, Worker
from tests.services.router.test_decision import worker

# Of full strides, so that predictions are exact.
PROMPTS = [
    chain([*range(STRIDE_BLOCKS * shared), *range(1_000 * n, 1_000 * n + STRIDE_BLOCKS)])
    for n, shared in enumerate((0, 1, 2, 4), start=1)
]
PROMPT = PROMPTS[3]
FIRST, SECOND = InstanceId(1), InstanceId(2)


def without_events(number: int) -> Worker:
    made = worker(number)
    made.holdings = EstimatedHoldings(capacity_blocks=10_000, ttl_seconds=1e9)
    return made


def test_a_prompt_counts_as_held_from_its_sending_until_the_index_had_time_to_learn_of_it() -> None:
    known, by = KnownOverlap(), worker(1)
    known.sent(by, PROMPT)
    assert known.overlaps(PROMPT, {}, [], 1e6) == {FIRST: len(PROMPT)}
    known.ended(by, PROMPT, 1e6, is_computed=True)
    assert known.overlaps(PROMPT, {}, [], 1e6 + KV_EVENT_SECONDS / 2) == {FIRST: len(PROMPT)}
    assert known.overlaps(PROMPT, {}, [], 1e6 + KV_EVENT_SECONDS) == {}
    assert len(known) == 0


def test_a_prompt_that_was_never_computed_is_forgotten_at_once() -> None:
    for by in (worker(1), without_events(1)):
        known = KnownOverlap()
        known.sent(by, PROMPT)
        known.ended(by, PROMPT, 0, is_computed=False)
        assert not any(known.overlaps(PROMPT, {}, [by], 0).values())
        assert len(known) == 0


def test_a_worker_without_events_is_believed_to_keep_what_it_computed() -> None:
    known, by = KnownOverlap(), without_events(1)
    known.sent(by, PROMPT)
    assert known.overlaps(PROMPT, {}, [by], 0) == {FIRST: len(PROMPT)}
    known.ended(by, PROMPT, 0, is_computed=True)
    assert known.overlaps(PROMPT, {}, [by], 1e6) == {FIRST: len(PROMPT)}
    assert len(known) == 0


def test_what_is_on_its_way_takes_nothing_from_what_the_index_tells() -> None:
    known = KnownOverlap()
    known.sent(worker(1), PROMPTS[2])  # Has two strides in common with PROMPT.
    tiered = TieredOverlap(device_blocks=10, host_blocks=10)
    assert known.overlaps(PROMPT, {FIRST: 20, SECOND: 3}, [], 0) == {FIRST: 20, SECOND: 3}
    on_its_way = TieredOverlap(device_blocks=16, host_blocks=4)
    assert known.overlaps(PROMPT, {FIRST: tiered}, [], 0) == {FIRST: on_its_way}
    assert known.overlaps(PROMPT, {FIRST: 3}, [], 0) == {FIRST: 2 * STRIDE_BLOCKS}


def common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return len({*ours} & {*theirs})  # Sequence hashes name all that comes before them.


happenings = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.integers(0, 3),
        st.sampled_from(["sent", "computed", "failed"]),
        st.floats(0, 2 * KV_EVENT_SECONDS),
    ),
    max_size=30,
)


@given(happenings, st.integers(0, 3), st.dictionaries(st.integers(1, 3), st.integers(0, 40)))
def test_it_agrees_with_a_list_of_all_that_happened(
    happenings: list[tuple[int, int, str, float]], asked: int, index: dict[int, int]
) -> None:
    """Workers 1 and 2 have events, worker 3 has none."""
    workers = {1: worker(1), 2: worker(2), 3: without_events(3)}
    known = KnownOverlap()
    live: list[tuple[int, int]] = []
    believed: list[tuple[int, int, float]] = []
    now = 0.0
    for number, prompt, what, pause in happenings:
        now += pause
        if what == "sent":
            live.append((number, prompt))
            known.sent(workers[number], PROMPTS[prompt])
        elif (number, prompt) in live:
            live.remove((number, prompt))
            is_computed = what == "computed"
            known.ended(workers[number], PROMPTS[prompt], now, is_computed=is_computed)
            if is_computed:
                until = 1e9 if number == 3 else now + KV_EVENT_SECONDS
                believed.append((number, prompt, until))
    told = {InstanceId(number): blocks for number, blocks in index.items() if number != 3}
    expected = dict(told)
    for number, prompt in [*live, *[(n, p) for n, p, until in believed if until > now]]:
        one = InstanceId(number)
        expected[one] = max(expected.get(one, 0), common(PROMPTS[prompt], PROMPTS[asked]))
    got = known.overlaps(PROMPTS[asked], told, [workers[3]], now)
    assert {k: v for k, v in got.items() if v} == {k: v for k, v in expected.items() if v}
