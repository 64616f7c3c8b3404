from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.router.core.held import HeldRequests
from services.router.core.workers import InstanceId

keys = st.integers(0, 9)
workers = st.sampled_from([InstanceId(number) for number in range(1, 4)])
additions = st.tuples(
    keys, st.integers(0, 5), st.integers(50, 100), st.dictionaries(workers, st.integers(1, 50))
)
rooms = st.dictionaries(workers, st.integers(-20, 120))


@given(st.lists(st.one_of(additions, keys), max_size=40), st.integers(1, 6), rooms)
def test_those_that_some_worker_has_room_for_are_told_in_order_of_arrival(
    taken: list[tuple[int, int, int, dict[InstanceId, int]] | int],
    bound: int,
    room: dict[InstanceId, int],
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
    expected = [
        key
        for key, (_, tokens, has) in sorted(model.items(), key=lambda item: item[1][0])
        if any(tokens - has.get(worker, 0) <= free for worker, free in room.items())
    ]
    assert held.fitting(room) == expected
