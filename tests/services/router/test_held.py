from __future__ import annotations

from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.core.held import HeldRequests, longest_wait_seconds
from services.router.core.workers import InstanceId

keys = st.integers(0, 9)
workers = st.sampled_from([InstanceId(number) for number in range(1, 4)])
additions = st.tuples(
    keys, st.integers(0, 5), st.integers(50, 100), st.dictionaries(workers, st.integers(1, 50))
)
rooms = st.dictionaries(workers, st.integers(-20, 120))


@given(st.lists(st.one_of(additions, keys), max_size=40), st.integers(1, 6), rooms, rooms)
def test_those_that_some_worker_has_room_for_when_it_is_their_turn_are_told_in_order_of_arrival(
    taken: list[tuple[int, int, int, dict[InstanceId, int]] | int],
    bound: int,
    room: dict[InstanceId, int],
    room_later: dict[InstanceId, int],
) -> None:
    held: HeldRequests[int] = HeldRequests(bound)
    model: dict[int, tuple[int, int, dict[InstanceId, int]]] = {}
    for what in taken:
        if isinstance(what, int):
            held.remove(what)
            model.pop(what, None)
            continue
        key, arrived_at, tokens, has = what
        if key in model:
            continue
        assert held.add(key, arrived_at, tokens, has) == (len(model) < bound)
        if len(model) < bound:
            model[key] = (arrived_at, tokens, has)
        assert len(held) == len(model)
    assert all((key in held) == (key in model) for key in range(10))
    # Sorting keeps those that arrived at the same time as they were added.
    expected = []
    free = room
    for key, (_, tokens, has) in sorted(model.items(), key=lambda item: item[1][0]):
        if not free or any(tokens - has.get(one, 0) <= left for one, left in free.items()):
            expected.append(key)
            free = room_later
    told = chain([room], repeat(room_later))
    assert list(held.to_try(lambda: next(told))) == expected


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_without_any_worker_all_that_are_still_held_are_told(
    added: set[int], removed: set[int]
) -> None:
    held: HeldRequests[int] = HeldRequests()
    for key in added:
        held.add(key, key, 100, {})
    found = []
    for key in held.to_try(dict):
        found.append(key)
        for other in removed - set(found):
            held.remove(other)
    first = min(added, default=0)
    assert found == sorted(key for key in added if key == first or key not in removed)


@pytest.mark.parametrize(
    ("left_seconds", "kv_left_seconds", "expected"),
    [(None, None, 20), (100.0, None, 20), (10.0, None, 5), (10.0, 4.0, 2), (-1.0, None, -0.5)],
)
def test_a_request_is_held_for_half_of_the_time_that_its_deadline_and_its_kv_leave(
    left_seconds: float | None, kv_left_seconds: float | None, expected: float
) -> None:
    assert longest_wait_seconds(20.0, left_seconds, kv_left_seconds) == expected
