"""What the host keeps of a computed prompt's KV, with a simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from libs.common import tracing
from libs.engine.sim.settings import SimSettings
from libs.worker.core.session import Session
from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.worker.v1 import worker_pb2
from tests.fixtures.eventually import WAIT_SECONDS, until
from tests.fixtures.spans import KeptSpans
from tests.fixtures.workers import MODEL, SimWorker, sim_worker

HANDLE = 1
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def computed(kv_lease_seconds: float = 30) -> AsyncIterator[tuple[SimWorker, Session]]:
    """A worker that has computed a client's prompt and waits for somebody to pull it."""
    settings = SimSettings(timing="fixed", step_ms=1, kv_lease_seconds=kv_lease_seconds)
    generation = generation_pb2.Generation(
        request_id="r",
        model=MODEL,
        token_ids=range(200),
        traceparent=TRACEPARENT,
        stopping=generation_pb2.StoppingOptions(max_tokens=3),
    )
    submit = worker_pb2.Submit(
        handle=HANDLE, leg=worker_pb2.LEG_PREFILL, generation=generation.SerializeToString()
    )
    async with sim_worker(discovery_pb2.ROLE_PREFILL_WORKER, "p", settings) as worker:
        session = worker.host.open(lambda: None, 8)
        worker.host.submit(session, [submit])
        await until(worker.host.idle.is_set)
        yield worker, session


async def test_a_cancellation_that_crossed_the_end_of_a_prefill_leg_frees_its_kv() -> None:
    async with computed() as (worker, session):
        assert worker.engine.load().active_kv_blocks > 0
        worker.host.cancel(session, [HANDLE])
        assert worker.engine.load().active_kv_blocks == 0


async def test_a_legs_spans_follow_each_other_from_its_arrival_to_its_end() -> None:
    kept = KeptSpans()
    with tracing.giving_to(kept):
        async with computed():
            pass
    *parts, (leg, ended_at_ns) = [(span, ended) for span, ended, *_ in kept.ended]
    assert [leg.name, *(span.name for span, _ in parts)] == ["prefill", "queue", "first token"]
    assert f"{leg.trace_id:032x}-{leg.parent_id:016x}" == TRACEPARENT[3:-3]
    at_ns = leg.began_at_ns
    for span, part_ended_at_ns in parts:
        assert span.parent_id == leg.span_id
        assert span.began_at_ns == at_ns
        at_ns = part_ended_at_ns
    assert at_ns == ended_at_ns


async def test_kv_stays_when_its_client_goes_since_somebody_may_be_pulling_it() -> None:
    async with computed() as (worker, session):
        worker.host.close(session)
        assert worker.engine.load().active_kv_blocks > 0


async def test_a_prefill_leg_is_forgotten_when_its_lease_ends() -> None:
    async with computed(kv_lease_seconds=0.05) as (worker, session):
        await until(lambda: not session.kept and worker.engine.load().active_kv_blocks == 0)


async def test_who_stays_hears_of_the_load_that_only_another_session_was_told() -> None:
    async with sim_worker(discovery_pb2.ROLE_DECODE_WORKER, "d") as worker:
        host = worker.host
        staying, leaving = (host.open(lambda: None, 8) for _ in range(2))
        idle = host.engine.load()
        assert staying.take(lambda: idle) is not None
        assert leaving.take(lambda: replace(idle, running_requests=1)) is not None
        staying.load_changed(idle, is_any_told=True)
        assert staying.take(lambda: idle) is None
        host.close(leaving)
        staying.load_changed(idle, is_any_told=True)
        assert staying.take(lambda: idle) is not None


async def test_who_is_idle_hears_when_kv_that_nobody_pulled_has_expired() -> None:
    async with computed(kv_lease_seconds=0.2) as (worker, _):
        heard_blocks: list[int] = []
        news = asyncio.Event()
        idle = worker.host.open(news.set, 8)

        def has_heard_the_end() -> bool:
            if (response := idle.take(worker.host.engine.load)) is not None:
                heard_blocks.append(response.load.active_kv_blocks)
            return heard_blocks[-1] == 0

        assert not has_heard_the_end()
        async with asyncio.timeout(WAIT_SECONDS):
            while not has_heard_the_end():
                news.clear()
                await news.wait()
