"""What a router itself has sent somewhere draws what belongs with it, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from libs.common import hashing
from libs.common.grpc_errors import from_rpc_error
from libs.engine.sim.settings import SimSettings
from switchgear.common.v1 import routing_pb2
from switchgear.router.v1 import router_pb2
from tests.fixtures.eventually import until
from tests.fixtures.workers import MODEL
from tests.services.router.standing import (
    DECODE,
    LONG_PROMPT,
    PREFILL,
    Stand,
    generate,
    generation,
    standing,
)

SLOW = SimSettings(timing="fixed", step_ms=20)
ONE_AT_A_TIME = SimSettings(timing="fixed", step_ms=20, max_running_requests=1)
GenerateCall = grpc.aio.UnaryStreamCall[router_pb2.GenerateRequest, router_pb2.GenerateResponse]


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """Its indexer tells of nothing."""
    async with standing() as made:
        yield made


def endless(stand: Stand, prompt: list[int], **options: object) -> GenerateCall:
    """A call that goes on until it is cancelled."""
    call: GenerateCall = stand.stub.Generate(
        router_pb2.GenerateRequest(
            generation=generation(prompt, 100_000),
            options=routing_pb2.RoutingOptions(**options),  # type: ignore[arg-type]
        )
    )
    return call


async def worker_of(call: GenerateCall) -> str:
    """Who serves a call, once it has its first token."""
    response = await call.read()
    assert isinstance(response, router_pb2.GenerateResponse)
    return response.routed.decode_worker.name


async def blocks_held(stand: Stand, prompt: list[int]) -> dict[str, int]:
    """What the router believes its decode workers to hold."""
    routing = router_pb2.RoutingRequest(
        request_id="r",
        model=MODEL,
        prompt_tokens=len(prompt),
        block_size_tokens=16,
        sequence_hashes=hashing.sequence_hashes(prompt, 16),
        keeps_prompt_local=True,
    )
    chosen = await stand.stub.SelectWorker(router_pb2.SelectWorkerRequest(routing=routing))
    return {c.worker.name: c.overlap_blocks for c in chosen.explanation.decode.candidates}


async def reason_of_failure(stand: Stand, prompt: list[int]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stand, prompt)
    return from_rpc_error(caught.value).reason


async def test_a_prompt_follows_one_that_is_in_progress_before_the_index_knows(
    stand: Stand,
) -> None:
    for name in ("d0", "d1", "d2"):
        await stand.add(DECODE, name, SLOW)
    first = endless(stand, LONG_PROMPT)
    home = await worker_of(first)
    _, routed = await generate(stand, LONG_PROMPT, 1)
    assert routed.decode_worker.name == home
    assert (await blocks_held(stand, LONG_PROMPT))[home] == 24
    first.cancel()


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_prompt_that_was_cancelled_before_its_turn_is_held_by_nobody(
    stand: Stand, has_events: bool
) -> None:
    worker = await stand.add(DECODE, "d", ONE_AT_A_TIME, publishes_kv_events=has_events)
    first = endless(stand, [1, 2, 3])
    await worker_of(first)
    waiting = endless(stand, LONG_PROMPT)
    await until(lambda: worker.engine.load().waiting_requests == 1)
    assert await blocks_held(stand, LONG_PROMPT) == {"d": 24}
    waiting.cancel()
    await until(lambda: worker.engine.load().waiting_requests == 0)
    assert await blocks_held(stand, LONG_PROMPT) == {"d": 0}
    first.cancel()


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_worker_that_takes_no_session_does_not_hold_the_prompt(
    stand: Stand, has_events: bool
) -> None:
    draining = await stand.add(DECODE, "d", publishes_kv_events=has_events)
    draining.host.is_draining = True
    assert await reason_of_failure(stand, LONG_PROMPT) == "WORKER_LOST"
    assert await blocks_held(stand, LONG_PROMPT) == {"d": 0}


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_worker_that_refused_a_prompt_does_not_hold_it(
    stand: Stand, has_events: bool
) -> None:
    worker = await stand.add(
        DECODE, "d", ONE_AT_A_TIME, max_waiting_requests=1, publishes_kv_events=has_events
    )
    running = endless(stand, [1, 2, 3])
    await worker_of(running)
    waiting = endless(stand, [4, 5, 6])
    await until(lambda: worker.engine.load().waiting_requests == 1)
    assert await reason_of_failure(stand, LONG_PROMPT) == "OVERLOADED"
    assert await blocks_held(stand, LONG_PROMPT) == {"d": 0}
    for call in (running, waiting):
        call.cancel()


async def test_a_prompt_that_is_prefilled_elsewhere_is_held_where_it_goes_on(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d", SLOW)
    call = endless(stand, LONG_PROMPT)
    await worker_of(call)
    assert await blocks_held(stand, LONG_PROMPT) == {"d": 24}
    call.cancel()


async def test_a_session_stays_with_its_worker(stand: Stand) -> None:
    for name in ("d0", "d1", "d2"):
        await stand.add(DECODE, name)
    homes = set()
    for number in range(8):
        call = endless(stand, [number] * 20, session_id="mine")
        homes.add(await worker_of(call))
        call.cancel()
        # The router, too, must have heard that it is over.
        await until(lambda: not any(worker.requests for worker in stand.fleet.workers))
    assert len(homes) == 1


async def test_a_session_leaves_a_worker_that_is_busier_than_the_others(stand: Stand) -> None:
    for name in ("d0", "d1"):
        await stand.add(DECODE, name, SLOW)
    first = endless(stand, [1] * 20, session_id="mine")
    home = await worker_of(first)
    crowd = [endless(stand, [10 + n] * 400, pinned_workers=[home]) for n in range(5)]
    for call in crowd:
        await worker_of(call)
    moved = endless(stand, [2] * 20, session_id="mine")
    assert await worker_of(moved) != home
    for call in (first, moved, *crowd):
        call.cancel()


async def test_a_session_id_of_any_length_is_not_remembered(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker_of(endless(stand, [1], session_id="x" * 1025))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1024" in (caught.value.details() or "")
