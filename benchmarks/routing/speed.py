"""How many decisions a second one core makes."""

from __future__ import annotations

import time
from random import Random

from benchmarks.routing.results import Decisions
from services.router.core.decision import Policy, Request, decide
from services.router.core.workers import InstanceId, Load, Role, Worker

BLOCK_SIZE_TOKENS = 16
PROMPT_BLOCKS = 128


def fleet(workers: int, random: Random) -> list[Worker]:
    """Workers of one model, busy in different ways."""
    made = []
    for number in range(workers):
        worker = Worker(
            instance_id=InstanceId(number + 1),
            name=f"decode-{number}",
            role=Role.DECODE,
            model="m",
            block_size_tokens=BLOCK_SIZE_TOKENS,
        )
        worker.load = Load(
            running_requests=random.randrange(32),
            queued_prefill_tokens=random.randrange(8_192),
            active_kv_blocks=random.randrange(8_192),
            total_kv_blocks=16_384,
        )
        worker.is_available = True
        made.append(worker)
    return made


def measure(workers: int, holders: int, policy_name: str, *, seconds: float = 2.0) -> Decisions:
    """Decisions with booking, as requests that come and go would cause them. Counted over this
    process's own CPU time."""
    random = Random(0)
    all_workers = fleet(workers, random)
    request = Request(
        model="m",
        prompt_tokens=PROMPT_BLOCKS * BLOCK_SIZE_TOKENS,
        block_size_tokens=BLOCK_SIZE_TOKENS,
    )
    policy = Policy(decode_policy=policy_name)
    overlaps = {InstanceId(1 + number): PROMPT_BLOCKS // 2 for number in range(holders)}
    made = 0
    started = time.process_time()
    while (elapsed := time.process_time() - started) < seconds:
        for _ in range(16):
            decision = decide(request, all_workers, overlaps, policy, random)
            assert decision is not None
            booking = decision.decode.booking
            decision.decode.worker.book(booking)
            decision.decode.worker.unbook(booking)
        made += 16
    return Decisions(
        workers=workers,
        holders=holders,
        policy=policy_name,
        decisions_per_second=made / elapsed,
    )
