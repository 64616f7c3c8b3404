"""The router's service over real gRPC, with simulated workers, and tables in place of etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from libs.common import grpc_errors, hashing, tracing
from libs.common.discovery import new_instance_id
from libs.common.errors import NoLiveInstance
from libs.common.grpc_errors import from_rpc_error
from libs.common.grpc_server import serving
from libs.engine.sim.settings import SimSettings
from services.router import fleet, outbox, waiting_room
from services.router.core.workers import Load
from services.router.decider import Decider
from switchgear.common.v1 import generation_pb2, outputs_pb2, routing_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.spans import KeptSpans
from tests.fixtures.workers import FILES, MODEL, SimWorker
from tests.services.router.standing import (
    DECODE,
    LONG_PROMPT,
    PREFILL,
    Session,
    Stand,
    generate,
    generation,
    standing,
)

SLOW = SimSettings(timing="fixed", step_ms=20)
HELD_SECONDS = 0.2
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with standing() as made:
        yield made


async def test_a_short_prompt_is_served_whole(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    tokens, routed = await generate(stand, [5, 6, 7])
    assert len(tokens) == 5
    assert routed.decode_worker.name == "d"
    assert not routed.HasField("prefill_worker")


async def test_a_long_prompt_is_prefilled_elsewhere_and_gives_the_same_tokens(
    stand: Stand,
) -> None:
    await stand.add(DECODE, "d")
    whole, _ = await generate(stand, LONG_PROMPT, 20)
    await stand.add(PREFILL, "p")
    await stand.workers["d"].die()
    stand.unlist("d")
    await stand.add(DECODE, "d2")
    tokens, routed = await generate(stand, LONG_PROMPT, 20)
    assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p", "d2")
    assert tokens == whole
    assert stand.workers["d2"].engine.counters().transferred_blocks == 25


async def test_a_prompt_whose_probabilities_are_asked_for_is_computed_where_it_goes_on(
    stand: Stand,
) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    asked = generation(LONG_PROMPT, 3)
    asked.logprobs.prompt_alternatives = 0
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=asked), timeout=10)
    responses = [response async for response in call]
    assert not responses[0].routed.HasField("prefill_worker")
    assert list(responses[0].prompt_logprobs.token_ids) == LONG_PROMPT[1:]
    routing = router_pb2.RoutingRequest(
        request_id="r", model=MODEL, prompt_tokens=len(LONG_PROMPT), keeps_prompt_local=True
    )
    chosen = await stand.stub.SelectWorker(router_pb2.SelectWorkerRequest(routing=routing))
    assert not chosen.HasField("prefill_worker")


async def test_an_unknown_model_is_not_found(stand: Stand) -> None:
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=generation([1], 1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).reason == "MODEL_NOT_FOUND"


async def test_a_model_with_prefill_workers_only_is_not_ready(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=generation([1], 1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(caught.value).reason == "NO_LIVE_INSTANCE"


async def test_the_worker_that_holds_the_prefix_gets_the_request(stand: Stand) -> None:
    await stand.add(DECODE, "d0")
    holder = await stand.add(DECODE, "d1")
    stand.indexer.blocks = {holder.instance.instance_id: 20}
    for _ in range(3):
        _, routed = await generate(stand, LONG_PROMPT, 1)
        assert routed.decode_worker.name == "d1"


async def test_a_dead_prefill_worker_costs_nothing_but_its_help() -> None:
    async with standing() as stand:
        await stand.add(PREFILL, "p", SimSettings(timing="default", chunk_tokens=256))
        await stand.add(DECODE, "d")
        session = Session(stand)
        await session.open()
        prompt = list(range(20_000))
        await session.submit(1, prompt, 3)
        prefill = stand.workers["p"].host
        await until(lambda: not prefill.idle.is_set())
        await stand.workers["p"].die()
        await session.read_until(lambda: 1 in session.finished)
        assert len(session.tokens[1]) == 3
        assert not session.routed[1].HasField("prefill_worker")
        assert session.failures == {}
        session.call.cancel()


async def test_a_prefill_worker_that_takes_too_long_is_given_up() -> None:
    async with standing(prefill_timeout_seconds=0.05) as stand:
        await stand.add(PREFILL, "p", SimSettings(timing="default", chunk_tokens=256))
        await stand.add(DECODE, "d")
        tokens, routed = await generate(stand, list(range(20_000)), 3)
        assert len(tokens) == 3
        assert not routed.HasField("prefill_worker")
        await until(stand.workers["p"].host.idle.is_set)


async def _while_its_prompt_is_computed(
    stand: Stand, change: Callable[[SimWorker], Awaitable[None]], *, is_pinned: bool = False
) -> tuple[router_pb2.Routed, router_pb2.Explanation]:
    """Where a request goes of which the decode worker that it would have gone to, `d0`, changes
    while `p` computes its prompt, and what is said of it."""
    prefill = await stand.add(PREFILL, "p", SimSettings(timing="default", chunk_tokens=256))
    holder = await stand.add(DECODE, "d0")
    await stand.add(DECODE, "d1")
    stand.indexer.blocks = {holder.instance.instance_id: 20}
    options = routing_pb2.RoutingOptions(pinned_workers=["d0"] if is_pinned else [])
    asked = generation(list(range(20_000)), 3)
    call = stand.stub.Generate(
        router_pb2.GenerateRequest(generation=asked, options=options), timeout=20
    )
    await until(lambda: not prefill.host.idle.is_set())
    await change(holder)
    responses = [response async for response in call]
    assert sum(len(response.token_ids) for response in responses) == 3
    said = await stand.stub.ExplainDecision(router_pb2.ExplainDecisionRequest(request_id="r"))
    [explanation] = said.explanations
    return responses[0].routed, explanation


def _fill(stand: Stand) -> Callable[[SimWorker], Awaitable[None]]:
    async def fill(full: SimWorker) -> None:
        for worker in stand.fleet.workers:
            if worker.instance_id == full.instance.instance_id:
                worker.load = Load(running_requests=200, active_kv_blocks=100_000)

    return fill


async def test_a_decode_worker_that_fills_up_while_the_prompt_is_computed_is_passed_over(
    stand: Stand,
) -> None:
    routed, said = await _while_its_prompt_is_computed(stand, _fill(stand))
    assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p", "d1")
    assert said.handover == router_pb2.HANDOVER_REMOTE
    assert (said.prefill.worker.name, said.decode.worker.name) == ("p", "d1")
    assert [c.worker.name for c in said.decode.candidates] == ["d1", "d0"]
    assert said.decode.candidates[1].requests == 200
    assert said.decode.transferred_tokens > 19_000


async def test_a_pinned_decode_worker_is_waited_for_even_if_it_fills_up(stand: Stand) -> None:
    routed, said = await _while_its_prompt_is_computed(stand, _fill(stand), is_pinned=True)
    assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p", "d0")
    assert said.decode.pick == router_pb2.PICK_PINNED


async def test_a_decode_worker_that_vanishes_while_the_prompt_is_computed_is_not_missed(
    stand: Stand,
) -> None:
    routed, said = await _while_its_prompt_is_computed(stand, lambda worker: worker.die())
    assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p", "d1")
    assert [c.worker.name for c in said.decode.candidates] == ["d1"]


# Room for 64 blocks: one request of 40 is in progress, and another of 40 does not fit beside it.
SMALL = SimSettings(timing="fixed", step_ms=5, kv_cache_tokens=1024)
LARGE_PROMPT = list(range(640))


async def _beside_a_large_request(stand: Stand, traceparent: str = "") -> Session:
    """A session with request 1 in progress at the small worker `d`, and 2 held back, which is
    traced if it has a traceparent."""
    session = Session(stand)
    await session.open()
    await session.submit(1, LARGE_PROMPT, 300)
    await session.read_until(lambda: bool(session.tokens.get(1)))
    await session.submit(2, [5] * 640, 3, traceparent)
    await until(lambda: _held() == 1)
    return session


def _held() -> float:
    return REGISTRY.get_sample_value("switchgear_router_held_requests") or 0.0


async def test_a_request_without_room_is_held_and_overtaken_by_one_that_fits(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    await session.submit(3, [1, 2, 3], 3)
    await session.read_until(lambda: 3 in session.finished)
    assert 1 not in session.finished
    assert worker.engine.load().waiting_requests == 0
    await session.read_until(lambda: 2 in session.finished)
    assert 1 in session.finished
    assert len(session.tokens[2]) == 3
    assert _held() == 0
    session.call.cancel()


async def test_a_spell_in_which_requests_are_held_is_told_with_how_many_and_for_how_long(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_room, "REST_SECONDS", 0.0)
    await stand.add(DECODE, "d", SMALL)
    with capture_logs() as logs:
        session = await _beside_a_large_request(stand)
        await session.submit(3, [6] * 640, 3)
        await session.read_until(lambda: {2, 3} <= session.finished.keys())
        await until(lambda: any(line["event"] == "room again" for line in logs))
    begin, over = (line for line in logs if "room" in line["event"])
    assert begin["event"] == "no room at any worker"
    assert (begin["request_id"], begin["workers"], begin["nearest_worker"]) == ("r2", 1, "d")
    assert over["outcomes"] == {"sent": 2}
    assert 0 < over["longest_seconds"] <= over["lasted_seconds"]
    session.call.cancel()


async def _holds_of(stand: Stand, request_id: str) -> list[router_pb2.Hold]:
    """Of the last decision on a request."""
    request = router_pb2.ExplainDecisionRequest(request_id=request_id, limit=1)
    [said] = (await stand.stub.ExplainDecision(request)).explanations
    return list(said.holds)


async def test_an_explanation_says_how_long_a_request_was_held_who_was_nearest_and_what_came_of_it(
    stand: Stand,
) -> None:
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    assert await _holds_of(stand, "r1") == []
    [lasting] = await _holds_of(stand, "r2")
    assert lasting.outcome == router_pb2.HOLD_OUTCOME_LASTS
    assert lasting.nearest_worker.name == "d"
    # Of 1,024 tokens 640 and those that came since are taken; 640 more do not fit.
    assert 0 < lasting.lacking_tokens - (640 + 640 - 1024) < 300
    assert not lasting.is_prompt_computed
    await session.read_until(lambda: 2 in session.finished)
    [hold] = await _holds_of(stand, "r2")
    assert hold.outcome == router_pb2.HOLD_OUTCOME_SENT
    assert hold.duration.ToNanoseconds() > lasting.duration.ToNanoseconds() > 0
    session.call.cancel()


async def test_a_request_that_is_held_with_its_prompt_computed_has_one_explanation(
    stand: Stand,
) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    await session.read_until(lambda: 2 in session.finished)
    request = router_pb2.ExplainDecisionRequest(request_id="r2")
    [said] = (await stand.stub.ExplainDecision(request)).explanations
    assert said.prefill.worker.name == "p"
    assert said.decode.transferred_tokens > 600
    assert [(hold.is_prompt_computed, hold.outcome) for hold in said.holds] == [
        (True, router_pb2.HOLD_OUTCOME_SENT)
    ]
    session.call.cancel()


async def test_the_wait_for_room_is_a_span_between_two_decisions(stand: Stand) -> None:
    await stand.add(DECODE, "d", SMALL)
    with tracing.giving_to(spans := KeptSpans()):
        session = await _beside_a_large_request(stand, SAMPLED)
        await session.read_until(lambda: 2 in session.finished)
        await until(lambda: any(span.name == "route" for span, *_ in spans.ended))
    router = [each for each in spans.ended if each[0].name in ("route", "decide", "held")]
    assert [span.name for span, *_ in router] == ["decide", "held", "decide", "route"]
    before, held, after, (route, *_) = router
    assert {span.parent_id for span, *_ in (before, held, after)} == {route.span_id}
    # One follows the other without a gap.
    assert (before[1], held[1]) == (held[0].began_at_ns, after[0].began_at_ns)
    assert held[1] > held[0].began_at_ns
    assert [each[2]["switchgear.has_room"] for each in (before, after)] == [False, True]
    assert held[2]["switchgear.hold_outcome"] == "sent"
    assert held[2]["switchgear.nearest_worker"] == "d"
    session.call.cancel()


async def test_a_held_request_that_nobody_is_left_for_has_waited_and_was_then_decided_on(
    stand: Stand,
) -> None:
    worker = await stand.add(DECODE, "d", SMALL)
    with tracing.giving_to(spans := KeptSpans()):
        session = await _beside_a_large_request(stand, SAMPLED)
        await worker.die()
        await until(lambda: any(span.name == "route" for span, *_ in spans.ended))
    held, after, route = (each for each in spans.ended[-3:])
    assert [span.name for span, *_ in (held, after, route)] == ["held", "decide", "route"]
    assert held[2]["switchgear.hold_outcome"] == "failed"
    assert after[0].began_at_ns == held[1]
    assert route[3] == "NO_LIVE_INSTANCE"
    session.call.cancel()


async def test_the_span_of_a_held_request_that_is_cancelled_ends_with_it(stand: Stand) -> None:
    await stand.add(DECODE, "d", SMALL)
    with tracing.giving_to(spans := KeptSpans()):
        session = await _beside_a_large_request(stand, SAMPLED)
        await session.cancel(2)
        await until(lambda: any(span.name == "route" for span, *_ in spans.ended))
    held, route = spans.ended[-2:]
    assert (held[0].name, held[2]["switchgear.hold_outcome"]) == ("held", "cancelled")
    assert (route[0].name, route[2]["switchgear.is_cancelled"]) == ("route", True)
    session.call.cancel()


async def test_a_held_request_that_is_cancelled_or_whose_frontend_leaves_is_forgotten(
    stand: Stand,
) -> None:
    worker = await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    await session.cancel(2)
    await until(lambda: _held() == 0)
    [hold] = await _holds_of(stand, "r2")
    assert hold.outcome == router_pb2.HOLD_OUTCOME_CANCELLED
    await session.submit(3, [6] * 640, 3)
    await until(lambda: _held() == 1)
    session.call.cancel()
    await until(lambda: _held() == 0)
    await until(worker.host.idle.is_set)


async def test_what_is_held_when_the_last_decode_worker_leaves_fails_at_once() -> None:
    async with standing(max_held_seconds=3600) as stand:
        worker = await stand.add(DECODE, "d", SMALL)
        session = await _beside_a_large_request(stand)
        await session.submit(3, [6] * 640, 3)
        await until(lambda: _held() == 2)
        await worker.die()
        await session.read_until(lambda: {1, 2, 3} <= session.failures.keys())
        reasons = [session.failures[handle].error.reason for handle in (1, 2, 3)]
        assert reasons == ["WORKER_LOST", "NO_LIVE_INSTANCE", "NO_LIVE_INSTANCE"]
        [hold] = await _holds_of(stand, "r3")
        assert hold.outcome == router_pb2.HOLD_OUTCOME_FAILED
        assert _held() == 0
        session.call.cancel()


async def test_of_many_held_requests_as_many_are_decided_on_as_there_is_room_for(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    for handle in range(3, 41):
        await session.submit(handle, [handle] * 640, 1)
    await until(lambda: _held() == 39)
    decided: list[str] = []
    _before_decisions(monkeypatch, decided.append)
    await session.read_until(lambda: len(session.finished) == 40)
    # Each has the worker to itself, so none is looked at before it is its turn.
    assert decided == [f"r{handle}" for handle in range(2, 41)]
    session.call.cancel()


def _before_decisions(monkeypatch: pytest.MonkeyPatch, call: Callable[[str], None]) -> None:
    """Calls with the id of each request before it is decided on, from now on."""
    decide = Decider.decide

    def called(self: Decider, routing: router_pb2.RoutingRequest, *args: Any, **kw: Any) -> Any:
        call(routing.request_id)
        return decide(self, routing, *args, **kw)

    monkeypatch.setattr(Decider, "decide", called)


def _break_decisions_on(monkeypatch: pytest.MonkeyPatch, request_id: str) -> None:
    def broken(decided_id: str) -> None:
        if decided_id == request_id:
            raise RuntimeError("as told")

    _before_decisions(monkeypatch, broken)


async def test_a_request_that_breaks_routing_fails_alone_of_those_that_came_with_it(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    _break_decisions_on(monkeypatch, "r4")
    await session.submit_all({3: [6] * 640, 4: [7] * 640, 5: [8] * 640}, 3)
    await session.read_until(lambda: len(session.finished) == 4)
    assert session.finished.keys() == {1, 2, 3, 5}
    assert {h: failed.error.reason for h, failed in session.failures.items()} == {4: "INTERNAL"}
    assert _held() == 0
    session.call.cancel()


async def test_a_held_request_that_breaks_routing_fails_alone_of_those_that_are_held(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    await session.submit(3, [6] * 640, 3)
    await until(lambda: _held() == 2)
    _break_decisions_on(monkeypatch, "r2")
    await session.read_until(lambda: 3 in session.finished)
    assert {h: failed.error.reason for h, failed in session.failures.items()} == {2: "INTERNAL"}
    assert _held() == 0
    session.call.cancel()


async def test_who_is_held_for_long_waits_at_a_worker() -> None:
    async with standing(max_held_seconds=HELD_SECONDS) as stand:
        worker = await stand.add(DECODE, "d", SMALL)
        session = await _beside_a_large_request(stand)
        await until(lambda: worker.engine.load().waiting_requests == 1)
        assert _held() == 0
        [hold] = await _holds_of(stand, "r2")
        assert hold.outcome == router_pb2.HOLD_OUTCOME_EXPIRED
        assert hold.duration.ToNanoseconds() >= HELD_SECONDS * 1e9
        await session.read_until(lambda: 2 in session.finished)
        session.call.cancel()


async def test_a_computed_prompt_without_room_is_held_and_its_kv_freed_when_cancelled(
    stand: Stand,
) -> None:
    prefill = await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d", SMALL)
    session = await _beside_a_large_request(stand)
    assert prefill.engine.load().active_kv_blocks == 40
    await session.cancel(2)
    await until(lambda: prefill.engine.load().active_kv_blocks == 0)
    await session.submit(3, [6] * 640, 3)
    await session.read_until(lambda: 3 in session.finished)
    assert session.routed[3].prefill_worker.name == "p"
    assert (len(session.tokens[3]), _held()) == (3, 0)
    session.call.cancel()


async def test_a_lost_decode_worker_is_reported_for_migration(stand: Stand) -> None:
    lost = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1, 2, 3], 1000)
    await session.read_until(lambda: len(session.tokens.get(1, [])) >= 3)
    await lost.die()
    await session.read_until(lambda: 1 in session.failures)
    failure = session.failures[1]
    assert failure.error.reason == "WORKER_LOST"
    assert failure.error.retryable
    assert failure.failed_instance_id == lost.instance.instance_id
    assert not any(worker.is_available for worker in stand.fleet.workers)
    session.call.cancel()


async def test_an_idle_worker_that_is_listed_again_is_available_at_once(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d")
    stand.unlist("d")
    assert not stand.is_available("d")
    stand.enlist(worker.instance, worker.card)
    assert stand.is_available("d")
    tokens, _ = await generate(stand, [1, 2, 3])
    assert len(tokens) == 5


async def test_a_dead_worker_that_is_still_listed_stays_unavailable(stand: Stand) -> None:
    dead = await stand.add(DECODE, "dead")
    await dead.die()
    await until(lambda: not stand.is_available("dead"))
    await stand.add(DECODE, "new")
    assert not stand.is_available("dead")


async def test_who_serves_a_request_is_told_with_its_first_outputs(stand: Stand) -> None:
    await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1, 2, 3], 3)
    await session.read()
    assert session.routed[1].decode_worker.name == "d"
    assert session.tokens[1]
    session.call.cancel()


async def test_who_serves_a_request_is_told_although_it_is_cancelled_before_it_has_outputs(
    stand: Stand,
) -> None:
    worker = await stand.add(DECODE, "d", SimSettings(timing="default", chunk_tokens=256))
    session = Session(stand)
    await session.open()
    await session.submit(1, list(range(20_000)), 3)
    await until(lambda: not worker.host.idle.is_set())
    await session.call.write(router_pb2.SessionRequest(cancels=[1]))
    await session.read()
    assert session.routed[1].decode_worker.name == "d"
    assert not session.tokens
    session.call.cancel()


async def test_cancelling_reaches_the_engine(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1, 2, 3], 100_000)
    await session.read_until(lambda: bool(session.tokens.get(1)))
    await session.call.write(router_pb2.SessionRequest(cancels=[1, 77]))
    await until(worker.host.idle.is_set)
    assert worker.engine.load().active_kv_blocks == 0
    session.call.cancel()


async def test_a_frontend_that_goes_away_leaves_nothing_running(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    for handle in range(1, 6):
        await session.submit(handle, [handle], 100_000)
    await session.read_until(lambda: len(session.tokens) == 5)
    session.call.cancel()
    await until(worker.host.idle.is_set)


async def test_a_refused_request_is_tried_on_another_worker(stand: Stand) -> None:
    full = await stand.add(DECODE, "full")
    full.host.is_draining = True
    await stand.add(DECODE, "free")
    stand.indexer.blocks = {full.instance.instance_id: 20}
    tokens, routed = await generate(stand, LONG_PROMPT, 4)
    assert len(tokens) == 4
    assert routed.decode_worker.name == "free"


class LateRefuser(worker_pb2_grpc.WorkerServiceServicer):
    """Decode workers of which the first to get a request refuses it late, and any later one ends it
    at once."""

    def __init__(self) -> None:
        self.times_to_live_seconds: list[float] = []
        """Of the KV session in each submit, in order."""

    async def Session(
        self, requests: AsyncIterator[worker_pb2.SessionRequest], context: object
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        yield worker_pb2.SessionResponse()
        async for request in requests:
            for submit in request.submits:
                time_to_live = grpc_errors.seconds_of(submit.kv_session.time_to_live)
                self.times_to_live_seconds.append(time_to_live)
                is_first = len(self.times_to_live_seconds) == 1
                yield await (_late_refusal if is_first else _end)(submit.handle)


async def _late_refusal(handle: int) -> worker_pb2.SessionResponse:
    await asyncio.sleep(HELD_SECONDS)
    error = grpc_errors.to_message(NoLiveInstance("the worker is draining"))
    return worker_pb2.SessionResponse(refusals=[worker_pb2.Refusal(handle=handle, error=error)])


async def _end(handle: int) -> worker_pb2.SessionResponse:
    finish = outputs_pb2.SequenceFinish(handle=handle, reason=generation_pb2.FINISH_REASON_STOP)
    outputs = outputs_pb2.StepOutputs(handles=[handle], token_ids=[1], finishes=[finish])
    return worker_pb2.SessionResponse(
        finished_handles=[handle], outputs=outputs.SerializeToString()
    )


async def test_the_time_that_a_late_refusal_took_is_gone_from_the_kv_session(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    refuser = LateRefuser()  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(refuser, server)

    async with serving("127.0.0.1", 0, add, [], grace_seconds=0) as server:
        for name in ("d0", "d1"):
            instance_id, address = new_instance_id(), f"127.0.0.1:{server.port}"
            stand.enlist(
                discovery_pb2.Instance(
                    instance_id=instance_id, role=DECODE, name=name, address=address
                ),
                discovery_pb2.ModelCard(
                    instance_id=instance_id,
                    role=DECODE,
                    model=MODEL,
                    kv_block_size_tokens=16,
                    transfer_backend="sim",
                ),
            )
        await until(lambda: stand.is_available("d0") and stand.is_available("d1"))
        tokens, _ = await generate(stand, LONG_PROMPT)
    assert tokens == [1]
    at_first, later = refuser.times_to_live_seconds
    assert 0 < later < at_first - HELD_SECONDS / 2


async def test_when_everyone_refuses_the_refusal_is_the_answer(stand: Stand) -> None:
    settings = SimSettings(timing="fixed", step_ms=20, max_running_requests=1)
    await stand.add(DECODE, "d", settings, max_waiting_requests=1)
    session = Session(stand)
    await session.open()
    for handle in range(1, 6):
        await session.submit(handle, [handle], 10_000)
    await session.read_until(lambda: bool(session.failures))
    assert {failure.error.reason for failure in session.failures.values()} == {"OVERLOADED"}
    session.call.cancel()


async def test_a_bad_parameter_is_named_and_not_retried(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    request = generation([1], 0)
    call = stand.stub.Generate(router_pb2.GenerateRequest(generation=request))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens" in (caught.value.details() or "")


async def test_a_deadline_ends_the_request_in_the_engine(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d", SLOW)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stand, [1], 100_000, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(worker.host.idle.is_set)


async def test_a_frontend_that_does_not_read_gets_merged_steps(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    session = Session(stand, window=1)
    await session.open()
    await session.submit(1, [1, 2, 3], 300)
    worker = stand.workers["d"]
    await until(lambda: not worker.host.idle.is_set())
    await until(worker.host.idle.is_set)
    reads = 0
    while 1 not in session.finished:
        await session.read()
        reads += 1
    assert len(session.tokens[1]) == 300
    # Without credit, everything after the first few messages waited and was merged.
    assert reads < 100
    session.call.cancel()


async def test_a_workers_load_is_known_while_and_after_a_frontends_session_tells_it(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the end of the frontend's session lets the router's own one go on.
    monkeypatch.setattr(fleet, "CONTROL_REST_SECONDS", 3600)
    worker = await stand.add(DECODE, "d", SLOW)
    [known] = stand.fleet.workers
    session = Session(stand)
    await session.open()
    for handle in range(1, 30):
        await session.submit(handle, [handle], 2)
        await session.read_until(lambda handle=handle: handle in session.finished)  # type: ignore[misc]
    async with grpc.aio.insecure_channel(worker.instance.address) as channel:
        others = worker_pb2_grpc.WorkerServiceStub(channel).Session()
        submit = worker_pb2.Submit(
            handle=1,
            generation=generation([1], 100_000).SerializeToString(),
            leg=worker_pb2.LEG_WHOLE,
        )
        message = worker_pb2.SessionRequest(sequence_number=1, window_responses=4, submits=[submit])
        await others.write(message)
        await until(lambda: known.load.running_requests == 1)
        session.call.cancel()
        others.cancel()
        await until(lambda: known.load.running_requests == 0)


async def test_a_handle_used_twice_ends_the_session(stand: Stand) -> None:
    await stand.add(DECODE, "d", SLOW)
    session = Session(stand)
    await session.open()
    await session.submit(1, [1], 1000)
    await session.submit(1, [1], 1000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.read_to_the_end()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bookings_are_gone_once_the_worker_counts_the_requests(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    await asyncio.gather(*(generate(stand, LONG_PROMPT, 3) for _ in range(10)))
    for worker in stand.fleet.workers:
        await until(lambda worker=worker: worker.booked_requests == 0)  # type: ignore[misc]
        assert (worker.booked_prefill_tokens, worker.booked_kv_blocks) == (0, 0)


async def test_select_worker_explains_without_running(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    holder = await stand.add(DECODE, "d0")
    await stand.add(DECODE, "d1")
    stand.indexer.blocks = {holder.instance.instance_id: 2}
    response = await stand.stub.SelectWorker(
        router_pb2.SelectWorkerRequest(
            routing=router_pb2.RoutingRequest(
                request_id="r",
                model=MODEL,
                prompt_tokens=64,
                block_size_tokens=16,
                sequence_hashes=hashing.sequence_hashes(range(64), 16),
            )
        )
    )
    assert response.decode_worker.name == "d0"
    leg = response.explanation.decode
    assert [c.worker.name for c in leg.candidates] == ["d0", "d1"]
    # 64 tokens, 32 of them held: 32 to compute and 2 blocks of 16 to add, at 0.2 a token.
    assert [c.cost for c in leg.candidates] == pytest.approx([32 + 0.2 * 32, 64 + 0.2 * 64])
    assert response.explanation.handover == router_pb2.HANDOVER_SHORT
    assert all(worker.host.idle.is_set() for worker in stand.workers.values())


async def test_model_files_arrive_whole(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d")
    async with grpc.aio.insecure_channel(worker.instance.address) as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        got: dict[str, bytes] = {}
        async for piece in stub.GetModelFiles(worker_pb2.GetModelFilesRequest(model=MODEL)):
            got[piece.name] = got.get(piece.name, b"") + piece.data
        assert got == FILES


@pytest.mark.parametrize(("limit_bytes", "is_cut"), [(1, True), (1 << 20, False)])
async def test_outputs_that_are_too_large_for_one_message_come_in_several(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, limit_bytes: int, is_cut: bool
) -> None:
    monkeypatch.setattr(outbox, "MAX_OUTPUTS_BYTES", limit_bytes)
    for name in ("a", "b", "c"):
        await stand.add(DECODE, name, SimSettings(timing="fixed", step_ms=1))
    # With one message on its way what several workers send has to wait.
    session = Session(stand, window=1)
    await session.open()
    for handle in range(1, 31):
        await session.submit(handle, [handle, 5], 50)
    await session.read_until(lambda: len(session.finished) == 30)
    assert all(len(tokens) == 50 for tokens in session.tokens.values())
    assert (session.most_outputs == 1) == is_cut
