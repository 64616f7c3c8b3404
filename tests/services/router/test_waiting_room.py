"""The waiting room on its own, of a router that knows no workers: all that are held are tried."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise

from libs.common.discovery import Table
from services.router.fleet import Fleet
from services.router.waiting_room import TRIES_PER_TURN, WaitingRoom
from tests.fixtures.eventually import WAIT_SECONDS
from tests.services.router.test_decision_log import record

REQUESTS = 100


async def test_between_some_tries_and_the_next_the_event_loop_does_other_things() -> None:
    room = WaitingRoom(Fleet(Table(), Table()))
    a_record = record("r")
    tried: list[int] = []
    retries = [partial(tried.append, number) for number in range(REQUESTS)]
    for number, retry in enumerate(retries):
        assert room.add(retry, a_record, float(number))
    tried_before = [0]
    async with asyncio.timeout(WAIT_SECONDS):
        while len(tried) < REQUESTS:
            await asyncio.sleep(0)
            tried_before.append(len(tried))
    for retry in retries:
        room.remove(retry, a_record.model)
    assert tried == list(range(REQUESTS))
    assert max(later - before for before, later in pairwise(tried_before)) == TRIES_PER_TURN
