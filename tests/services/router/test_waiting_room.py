"""The waiting room on its own. Its router knows no workers that could have room, unless told: all
that are held are tried."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from libs.common.discovery import Table
from services.router import waiting_room
from services.router.core.decision_log import Record
from services.router.core.hold import HoldEnd
from services.router.core.workers import Load
from services.router.fleet import Fleet
from services.router.waiting_room import TRIES_PER_TURN, Place, WaitingRoom
from tests.fixtures.eventually import WAIT_SECONDS, until
from tests.services.router.test_decision import worker
from tests.services.router.test_decision_log import record

REQUESTS = 100


def take_in(room: WaitingRoom, of: Record) -> Place:
    place = room.take_in(lambda: None, of, 0.0, is_prompt_computed=False)
    assert place is not None
    return place


def held_for(outcome: HoldEnd) -> tuple[float, float]:
    """How many requests were held until then, and for how many seconds in all."""
    labels = {"outcome": outcome.value}
    name = "switchgear_router_held_seconds"
    count = REGISTRY.get_sample_value(f"{name}_count", labels)
    seconds = REGISTRY.get_sample_value(f"{name}_sum", labels)
    assert count is not None
    assert seconds is not None
    return count, seconds


async def test_between_some_tries_and_the_next_the_event_loop_does_other_things() -> None:
    room = WaitingRoom(Fleet(Table(), Table()))
    a_record = record("r")
    tried: list[int] = []
    places = []
    for number in range(REQUESTS):
        retry = partial(tried.append, number)
        place = room.take_in(retry, a_record, float(number), is_prompt_computed=False)
        assert place is not None
        places.append(place)
    tried_before = [0]
    async with asyncio.timeout(WAIT_SECONDS):
        while len(tried) < REQUESTS:
            await asyncio.sleep(0)
            tried_before.append(len(tried))
    for place in places:
        room.leave(place, HoldEnd.SENT)
    assert tried == list(range(REQUESTS))
    assert max(later - before for before, later in pairwise(tried_before)) == TRIES_PER_TURN


@pytest.mark.parametrize("end", HoldEnd)
async def test_how_long_a_request_was_held_is_counted_once_by_what_became_of_it(
    end: HoldEnd,
) -> None:
    room = WaitingRoom(Fleet(Table(), Table()))
    count, seconds = held_for(end)
    place = take_in(room, record("r"))
    assert place.hold.ended_at is None
    room.leave(place, end)
    room.leave(place, HoldEnd.FAILED)
    assert place.hold.end is end
    count_now, seconds_now = held_for(end)
    assert count_now == count + 1
    assert seconds_now == pytest.approx(seconds + place.hold.seconds(now=0))


async def test_who_lacked_the_least_room_and_how_much_is_kept() -> None:
    room = WaitingRoom(Fleet(Table(), Table()))
    full, fuller = (worker(number) for number in range(2))
    full.load = Load(running_requests=1, active_kv_blocks=10, total_kv_blocks=10)
    fuller.load = Load(
        running_requests=1, queued_prefill_tokens=7, active_kv_blocks=10, total_kv_blocks=10
    )
    place = take_in(room, record("r", among=[fuller, full]))
    room.leave(place, HoldEnd.SENT)
    # All ten of ten blocks are taken, and the prompt needs another one.
    assert (place.hold.nearest, place.hold.lacking_tokens) == (full, 10)


async def test_a_spell_without_room_is_told_when_it_begins_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting_room, "REST_SECONDS", 0.0)
    room = WaitingRoom(Fleet(Table(), Table()))
    with capture_logs() as logs:
        # The second comes when nobody is held, before the rest is over.
        for number, end in enumerate((HoldEnd.SENT, HoldEnd.EXPIRED)):
            room.leave(take_in(room, record(f"r{number}")), end)
        await until(lambda: len(logs) == 2)
        begin, over = logs
        assert begin["event"] == "no room at any worker"
        assert (begin["model"], begin["request_id"], begin["nearest_worker"]) == ("m", "r0", "w0")
        assert (over["model"], over["held_requests"]) == ("m", 2)
        assert over["outcomes"] == {"sent": 1, "expired": 1}
        room.leave(take_in(room, record("r2")), HoldEnd.FAILED)
        await until(lambda: len(logs) == 4)
        assert (logs[2]["event"], logs[3]["held_requests"]) == ("no room at any worker", 1)
