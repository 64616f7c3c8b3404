"""What the router says of its decisions, over real gRPC with simulated workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import struct_pb2

from deploy.local.explaining import lack_in_words
from libs.common import hashing
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


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with standing() as made:
        yield made


async def explain(
    stand: Stand, request_id: str = "", limit: int = 0
) -> list[router_pb2.Explanation]:
    request = router_pb2.ExplainDecisionRequest(request_id=request_id, limit=limit)
    return list((await stand.stub.ExplainDecision(request)).explanations)


async def served_by(stand: Stand, prompt: list[int], **options: object) -> router_pb2.Routed:
    """Who serves a request with these routing options."""
    request = router_pb2.GenerateRequest(
        generation=generation(prompt, 1),
        options=routing_pb2.RoutingOptions(**options),  # type: ignore[arg-type]
    )
    call = stand.stub.Generate(request, timeout=20)
    first, *_ = [response async for response in call]
    return first.routed


async def test_both_legs_are_explained_with_what_the_engines_found(stand: Stand) -> None:
    await stand.add(PREFILL, "p0")
    holder = await stand.add(PREFILL, "p1")
    await stand.add(DECODE, "d")
    # The index is wrong: nobody holds anything yet.
    stand.indexer.blocks = {holder.instance.instance_id: 4}
    await generate(stand, LONG_PROMPT)
    [said] = await explain(stand)
    assert (said.request_id, said.model, said.prompt_tokens) == ("r", MODEL, len(LONG_PROMPT))
    assert said.handover == router_pb2.HANDOVER_REMOTE
    assert (said.uncached_tokens, said.local_overlap) == (len(LONG_PROMPT), 0)
    assert said.are_overlaps_known
    assert said.prefill.worker.name == "p1"
    assert said.prefill.pick == router_pb2.PICK_LOWEST
    assert (said.prefill.predicted_cached_tokens, said.prefill.reported_cached_tokens) == (64, 0)
    assert {c.worker.name: c.cost for c in said.prefill.candidates} == {
        "p0": len(LONG_PROMPT),
        "p1": len(LONG_PROMPT) - 64,
    }
    assert said.decode.worker.name == said.whole.worker.name == "d"
    assert said.decode.transferred_tokens > 300
    assert said.decode.reported_cached_tokens == 0


async def test_a_request_that_is_served_whole_says_why_and_what_was_cached(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d")
    await generate(stand, LONG_PROMPT)
    stand.indexer.blocks = {worker.instance.instance_id: 25}
    await generate(stand, LONG_PROMPT)
    again, first = await explain(stand)
    assert first.handover == router_pb2.HANDOVER_NO_PREFILL_WORKER
    assert (first.decode.predicted_cached_tokens, first.decode.reported_cached_tokens) == (0, 0)
    assert again.decode.predicted_cached_tokens == len(LONG_PROMPT) - 1
    assert again.decode.reported_cached_tokens > 300
    assert not again.HasField("prefill")


async def test_each_decision_on_a_refused_request_is_explained(stand: Stand) -> None:
    full = await stand.add(DECODE, "full")
    full.host.is_draining = True
    await stand.add(DECODE, "free")
    stand.indexer.blocks = {full.instance.instance_id: 20}
    await generate(stand, LONG_PROMPT)
    later, first = await explain(stand, "r")
    assert (first.decode.worker.name, later.decode.worker.name) == ("full", "free")
    assert [c.worker.name for c in later.decode.candidates] == ["free"]


async def test_the_last_decisions_are_remembered_up_to_the_setting() -> None:
    async with standing(explained_decisions=2) as stand:
        await stand.add(DECODE, "d")
        for number in range(3):
            request = generation([1, 2, 3], 1, f"r{number}")
            async for _ in stand.stub.Generate(router_pb2.GenerateRequest(generation=request)):
                pass
        assert [said.request_id for said in await explain(stand)] == ["r2", "r1"]
        assert [said.request_id for said in await explain(stand, limit=1)] == ["r2"]
        assert await explain(stand, "r0") == []


async def test_a_selection_is_explained_as_a_decision_is_but_not_remembered(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    routing = router_pb2.RoutingRequest(
        request_id="r",
        model=MODEL,
        prompt_tokens=len(LONG_PROMPT),
        block_size_tokens=16,
        sequence_hashes=hashing.sequence_hashes(LONG_PROMPT, 16),
    )
    selected = await stand.stub.SelectWorker(router_pb2.SelectWorkerRequest(routing=routing))
    assert await explain(stand) == []
    await generate(stand, LONG_PROMPT)
    [said] = await explain(stand)
    for message in (said, selected.explanation):
        message.ClearField("decided_at")
        for leg in (message.prefill, message.decode):
            leg.ClearField("reported_cached_tokens")
            leg.ClearField("transferred_tokens")
    assert said == selected.explanation


async def test_a_lasting_disagreement_with_the_engines_is_told(stand: Stand) -> None:
    worker = await stand.add(DECODE, "d")
    # As if all of the worker's removals had been lost.
    stand.indexer.blocks = {worker.instance.instance_id: 20}
    for number in range(20):
        await generate(stand, [number] * 400, 1)
    response = await stand.stub.ExplainDecision(router_pb2.ExplainDecisionRequest(limit=1))
    told = [(it.source, it.reason) for it in response.degradations]
    assert told == [("d", "removed_events_missing")]
    [lack] = response.degradations
    assert lack_in_words(lack) == "d: removed_events_missing"
    await worker.die()
    stand.unlist("d")
    await until(lambda: not stand.fleet.members)
    response = await stand.stub.ExplainDecision(router_pb2.ExplainDecisionRequest(limit=1))
    assert list(response.degradations) == []


async def test_a_request_may_name_its_workers(stand: Stand) -> None:
    await stand.add(PREFILL, "p0")
    await stand.add(PREFILL, "p1")
    await stand.add(DECODE, "d0")
    last = await stand.add(DECODE, "d1")
    for _ in range(3):
        routed = await served_by(stand, [1, 2, 3], pinned_workers=["p1", "d0"])
        assert (routed.prefill_worker.name, routed.decode_worker.name) == ("p1", "d0")
    by_id = f"{last.instance.instance_id:016x}"
    assert (await served_by(stand, [1], pinned_workers=[by_id])).decode_worker.name == "d1"
    for _ in range(3):
        assert (await served_by(stand, [1], excluded_workers=["d0"])).decode_worker.name == "d1"
    assert (await explain(stand, limit=4))[-1].decode.pick == router_pb2.PICK_PINNED


async def test_a_request_may_have_its_own_temperature_and_policy(stand: Stand) -> None:
    await stand.add(DECODE, "d")
    await served_by(stand, [1], temperature=0.5, policy="kv")
    await served_by(stand, [1])
    plain, hot = await explain(stand)
    assert (plain.decode.temperature, hot.decode.temperature) == (0, 0.5)
    assert hot.decode.policy == "kv"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (
            {"policy": "nonsense"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "there are direct, kv,",
        ),
        ({"temperature": -1}, grpc.StatusCode.INVALID_ARGUMENT, "at least 0"),
        ({"pinned_workers": ["d0", "d1"]}, grpc.StatusCode.INVALID_ARGUMENT, "more than one"),
        ({"pinned_workers": ["nobody"]}, grpc.StatusCode.UNAVAILABLE, "'nobody'"),
        ({"excluded_workers": ["d0", "d1"]}, grpc.StatusCode.UNAVAILABLE, "routing options"),
    ],
)
async def test_routing_options_that_cannot_be_had_are_named(
    stand: Stand, options: dict[str, object], code: grpc.StatusCode, words: str
) -> None:
    await stand.add(DECODE, "d0")
    await stand.add(DECODE, "d1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served_by(stand, [1], **options)
    assert caught.value.code() is code
    assert words in (caught.value.details() or "")


async def test_a_live_setting_changes_the_next_decision(stand: Stand) -> None:
    await stand.add(PREFILL, "p")
    await stand.add(DECODE, "d")
    _, routed = await generate(stand, LONG_PROMPT, 1)
    assert routed.HasField("prefill_worker")
    value = struct_pb2.Value(number_value=100_000)
    stand.live_settings.replace({("min_remote_prefill_tokens", MODEL): value}, 7)
    _, routed = await generate(stand, LONG_PROMPT, 1)
    assert not routed.HasField("prefill_worker")
    said = await stand.stub.GetSettings(router_pb2.GetSettingsRequest())
    assert said.revision == 7
    mine = [(s.key, s.value) for s in said.settings if s.model == MODEL]
    assert mine == [("min_remote_prefill_tokens", "100000")]


async def test_a_conversation_sticks_to_a_worker_without_events(stand: Stand) -> None:
    settings = SimSettings(timing="fixed", step_ms=1)
    for name in ("d0", "d1", "d2"):
        await stand.add(DECODE, name, settings, publishes_kv_events=False)
    prompts = [[50 + number] * 400 for number in range(8)]
    homes = []
    for turn in range(3):
        routed = [await generate(stand, prompt, 1) for prompt in prompts]
        homes.append([route.decode_worker.name for _, route in routed])
        prompts = [prompt + [1000 + turn] * 200 for prompt in prompts]
    assert homes[0] == homes[1] == homes[2]
    assert len(set(homes[0])) > 1
    last, *_ = await explain(stand, limit=1)
    assert last.decode.predicted_cached_tokens == last.decode.reported_cached_tokens == 592


async def test_workers_without_events_need_no_indexer(stand: Stand) -> None:
    await stand.add(DECODE, "d", publishes_kv_events=False)
    stand.indexer.blocks = {1: 1}
    await asyncio.gather(*(generate(stand, LONG_PROMPT, 1) for _ in range(3)))
    assert stand.indexer.queries == 0


async def test_what_an_indexer_lacks_is_told_with_its_name_and_those_of_its_workers(
    stand: Stand,
) -> None:
    worker = await stand.add(DECODE, "d")
    unknown = 0xABC
    stand.indexer.lacking = {"gap": [worker.instance.instance_id, unknown]}
    await generate(stand, LONG_PROMPT)
    request = router_pb2.ExplainDecisionRequest(limit=1)
    [lack] = (await stand.stub.ExplainDecision(request)).degradations
    assert (lack.source, list(lack.workers)) == ("i", ["d", f"{unknown:016x}"])
    assert lack_in_words(lack) == f"i at {lack.address}: gap of d, {unknown:016x}"
    stand.indexer.lacking = {}
    await generate(stand, LONG_PROMPT)
    assert not (await stand.stub.ExplainDecision(request)).degradations
