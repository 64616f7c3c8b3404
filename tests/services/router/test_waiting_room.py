"""The waiting room on its own, of a router that knows no workers: all that are held are tried."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise
from random import Random

from libs.common.discovery import Table
from services.router.core.decision import Policy, Request, decide
from services.router.core.decision_log import Record
from services.router.core.workers import InstanceId, Role, Worker
from services.router.fleet import Fleet
from services.router.waiting_room import TRIES_PER_TURN, WaitingRoom
from tests.fixtures.eventually import WAIT_SECONDS

MODEL = "m"
REQUESTS = 100


def a_record() -> Record:
    """A decision on some request."""
    worker = Worker(
        instance_id=InstanceId(1), name="d", role=Role.DECODE, model=MODEL, block_size_tokens=16
    )
    worker.is_available = True
    request = Request(model=MODEL, prompt_tokens=64, block_size_tokens=16)
    decision = decide(request, [worker], {}, Policy(), Random(0))
    assert decision is not None
    return Record(
        request_id="r",
        model=MODEL,
        decided_at=0,
        prompt_tokens=64,
        block_size_tokens=16,
        decision=decision,
        policy=Policy(),
        are_overlaps_known=True,
    )


async def test_between_some_tries_and_the_next_the_event_loop_does_other_things() -> None:
    room = WaitingRoom(Fleet(Table(), Table()))
    record = a_record()
    tried: list[int] = []
    retries = [partial(tried.append, number) for number in range(REQUESTS)]
    for number, retry in enumerate(retries):
        assert room.add(retry, record, float(number))
    tried_before = [0]
    async with asyncio.timeout(WAIT_SECONDS):
        while len(tried) < REQUESTS:
            await asyncio.sleep(0)
            tried_before.append(len(tried))
    for retry in retries:
        room.remove(retry, MODEL)
    assert tried == list(range(REQUESTS))
    assert max(later - before for before, later in pairwise(tried_before)) == TRIES_PER_TURN
