"""A simulated deployment of real processes: what users see, and what happens when parts fail."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.running import LONG_PROMPT, Running, running, stream, text_of
from tests.fixtures.eventually import eventually, until

DECODE_WORKERS = ("decode_worker-0", "decode_worker-1")
PREFILL_WORKERS = ("prefill_worker-0", "prefill_worker-1")


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        sim_step_ms=20,
        prefill=2,
        decode=2,
        routers=2,
        frontends=2,
        indexers=2,
    ) as it:
        yield it


@pytest.fixture
async def client(deployment: Running) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60, limits=limits) as client:
        yield client


def chat_body(deployment: Running, prompt: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": deployment.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream_options": {"include_usage": True},
    }


async def restart(deployment: Running, name: str) -> None:
    await asyncio.to_thread(deployment.cluster.restart, name, 60)


async def test_two_hundred_streams_all_finish_with_the_right_token_counts(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    async def one(number: int) -> tuple[int, int]:
        wanted = 10 + number % 30
        prompt = f"{number} {LONG_PROMPT if number % 3 == 0 else 'hello'}"
        usage = None
        async for event in stream(client, chat_body(deployment, prompt, wanted)):
            usage = event["usage"] or usage
        assert usage is not None
        return wanted, usage["completion_tokens"]

    for wanted, got in await asyncio.gather(*(one(number) for number in range(200))):
        assert got == wanted


async def test_the_official_client_streams_a_chat(deployment: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        models = [model.id async for model in client.models.list()]
        assert models == [deployment.model]
        chunks = await client.chat.completions.create(
            model=deployment.model,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        whole = await client.chat.completions.create(
            model=deployment.model, messages=[{"role": "user", "content": "hello"}], max_tokens=12
        )
        assert usage is not None
        assert usage.completion_tokens == 12
        assert whole.choices[0].message.content == text
        assert whole.choices[0].finish_reason == "length"


def test_a_long_prompt_is_prefilled_elsewhere_and_what_continues_it_goes_to_the_same_worker(
    deployment: Running,
) -> None:
    prompt = "Once. " + LONG_PROMPT
    first = deployment.chat(prompt)
    assert first.prefill_worker in PREFILL_WORKERS
    assert first.decode_worker in DECODE_WORKERS
    # The chat template's own first block is everybody's.
    assert first.cached_tokens < 50
    for round_ in range(3):
        # Mostly new, so that it is worth a prefill worker again.
        longer = deployment.chat(f"{prompt} {round_} " + "And then what happened? " * 200)
        assert longer.prefill_worker == first.prefill_worker
        assert longer.cached_tokens > 500


def test_the_same_long_prompt_again_is_served_from_the_cache(deployment: Running) -> None:
    prompt = "Twice. " + LONG_PROMPT
    first = deployment.chat(prompt)
    again = deployment.chat(prompt)
    # The decode worker holds it all by now, so it needs nobody.
    assert again.decode_worker == first.decode_worker
    assert again.prefill_worker is None
    assert again.cached_tokens > 500
    assert again.text == first.text


def test_what_a_transfer_moved_is_counted(deployment: Running) -> None:
    def moved(name: str) -> float:
        return sum(deployment.metric(worker, name) for worker in DECODE_WORKERS)

    blocks, size = moved("switchgear_worker_kv_transfer_blocks_total"), 131_072 * 16
    moved_bytes = moved("switchgear_worker_kv_transfer_bytes_total")
    answer = deployment.chat("Thrice. " + LONG_PROMPT)
    assert answer.prefill_worker is not None
    prompt_blocks = answer.body["usage"]["prompt_tokens"] // 16
    new_blocks = moved("switchgear_worker_kv_transfer_blocks_total") - blocks
    assert prompt_blocks - 3 <= new_blocks <= prompt_blocks + 1
    new_bytes = moved("switchgear_worker_kv_transfer_bytes_total") - moved_bytes
    assert new_bytes == new_blocks * size


async def test_a_decode_worker_killed_mid_stream_costs_no_token(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    body = chat_body(deployment, "Tell me a long story.", 100)
    expected = "".join([text_of(event) async for event in stream(client, body)])
    got, victim, usage = "", "", None
    async with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}
    ) as response:
        victim = response.headers["x-switchgear-decode-worker"]
        async for event in _events(response):
            if not got and text_of(event):
                deployment.cluster.kill(victim, signal.SIGKILL)
            got += text_of(event)
            usage = event["usage"] or usage
    assert got == expected
    assert usage is not None
    assert usage["completion_tokens"] == 100
    await restart(deployment, victim)


async def test_a_router_killed_mid_stream_costs_no_token(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    body = chat_body(deployment, "Tell me another long story.", 100)
    expected = "".join([text_of(event) async for event in stream(client, body)])

    async def one() -> str:
        return "".join([text_of(event) async for event in stream(client, body)])

    async def kill() -> None:
        # Eight streams over two routers: some are on this one.
        await asyncio.sleep(0.5)
        deployment.cluster.kill("router-0", signal.SIGKILL)

    *texts, _ = await asyncio.gather(*(one() for _ in range(8)), kill())
    assert texts == [expected] * 8
    await restart(deployment, "router-0")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def test_without_prefill_workers_prompts_are_computed_by_decode_workers(
    deployment: Running,
) -> None:
    for name in PREFILL_WORKERS:
        deployment.cluster.kill(name, signal.SIGKILL)
    # At once: nobody waits for a lease to end.
    answer = await asyncio.to_thread(deployment.chat, "Alone. " + LONG_PROMPT)
    assert answer.status == 200
    assert answer.prefill_worker is None
    for name in PREFILL_WORKERS:
        await restart(deployment, name)

    async def is_used_again() -> bool:
        prompt = f"{asyncio.get_running_loop().time()} {LONG_PROMPT}"
        return (await asyncio.to_thread(deployment.chat, prompt)).prefill_worker is not None

    await eventually(is_used_again)


async def test_a_client_that_leaves_frees_the_engine(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    async def engines_are_idle() -> bool:
        for name in DECODE_WORKERS:
            async with deployment.channel(name) as channel:
                stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(
                    channel
                )
                if (await stub.GetStatus(worker_pb2.GetStatusRequest())).request_ids:
                    return False
        return True

    body = chat_body(deployment, "A very long answer, please.", 5000)
    async for event in stream(client, body):
        if text_of(event):
            assert not await engines_are_idle()
            break
    await eventually(engines_are_idle)


async def test_etcd_may_restart(deployment: Running) -> None:
    deployment.cluster.kill("etcd-0", signal.SIGKILL)
    answer = await asyncio.to_thread(deployment.chat, "Who needs etcd?")
    assert answer.status == 200
    await restart(deployment, "etcd-0")
    # Someone new is found, so everyone watches again.
    await restart(deployment, "prefill_worker-0")
    name = deployment.cluster.process("prefill_worker-0").name

    def sees_it() -> bool:
        log = deployment.cluster.log_path("router-0").read_text()
        return log.count(f'"worker": "{name}"') >= 2

    await until(sees_it)
    assert (await asyncio.to_thread(deployment.chat, "And now?")).status == 200


async def test_nats_may_restart_and_the_index_is_right_again(deployment: Running) -> None:
    deployment.cluster.kill("nats-0", signal.SIGKILL)
    # Stored while nobody could be told.
    prompt = "Unheard of. " + LONG_PROMPT
    first = await asyncio.to_thread(deployment.chat, prompt)
    assert first.status == 200
    await restart(deployment, "nats-0")

    async def is_known() -> bool:
        async with deployment.channel("kv_indexer-0") as channel:
            stub: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
                kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            )
            status = await stub.GetStatus(kv_indexer_pb2.GetStatusRequest())
            reasons = [worker.degraded_reason for worker in status.workers]
            return len(reasons) == 4 and not any(reasons)

    await eventually(is_known)
    again = await asyncio.to_thread(deployment.chat, prompt)
    assert again.decode_worker == first.decode_worker
    assert again.cached_tokens > 500


async def test_without_indexers_routing_goes_by_load(deployment: Running) -> None:
    for name in ("kv_indexer-0", "kv_indexer-1"):
        deployment.cluster.kill(name, signal.SIGKILL)
    answer = await asyncio.to_thread(deployment.chat, "Who holds what? " + LONG_PROMPT)
    assert answer.status == 200
    degraded = [
        name
        for name in ("router-0", "router-1")
        if deployment.metric(name, "switchgear_router_degraded", reason="no_kv_indexer")
    ]
    assert degraded
    async with deployment.channel(degraded[0]) as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        said = await stub.ExplainDecision(router_pb2.ExplainDecisionRequest(limit=1))
    # Their leases outlive them: each is named, with where it was.
    assert {(lack.source, lack.reason) for lack in said.degradations} == {
        ("kv_indexer-0", "no_kv_indexer"),
        ("kv_indexer-1", "no_kv_indexer"),
    }
    assert all(lack.address and lack.details for lack in said.degradations)
    for name in ("kv_indexer-0", "kv_indexer-1"):
        await restart(deployment, name)


@pytest.mark.parametrize(
    ("service", "full_name"),
    [
        ("frontend-0", "switchgear.inference.v1.InferenceService"),
        ("router-0", "switchgear.router.v1.RouterService"),
        ("kv_indexer-0", "switchgear.kv_indexer.v1.KvIndexerService"),
        ("prefill_worker-0", "switchgear.prefill_worker.v1.PrefillWorkerService"),
        ("decode_worker-0", "switchgear.decode_worker.v1.DecodeWorkerService"),
    ],
)
async def test_every_service_has_health_and_reflection(
    deployment: Running, service: str, full_name: str
) -> None:
    async with deployment.channel(service) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest(service=full_name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc
        stub = reflection.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = [
            listed.name async for answer in call for listed in answer.list_services_response.service
        ]
        assert full_name in names


async def test_the_plain_call_on_the_router_answers(deployment: Running) -> None:
    async with deployment.channel("router-0") as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        call = stub.Generate(
            router_pb2.GenerateRequest(
                generation=generation_pb2.Generation(
                    request_id="by-hand",
                    model=deployment.model,
                    token_ids=range(100, 500),
                    stopping=generation_pb2.StoppingOptions(max_tokens=7),
                )
            ),
            timeout=30,
        )
        responses = [response async for response in call]
    assert sum(len(response.token_ids) for response in responses) == 7
    assert responses[0].routed.prefill_worker.name in PREFILL_WORKERS
    assert responses[-1].finish_reason == generation_pb2.FINISH_REASON_LENGTH


async def test_internal_teams_get_the_same_text_over_grpc(deployment: Running) -> None:
    rest = await asyncio.to_thread(deployment.chat, "hello there", max_tokens=9)
    async with deployment.channel("frontend-0") as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = (
            inference_pb2_grpc.InferenceServiceStub(channel)
        )
        request = inference_pb2.GenerateRequest(
            model=deployment.model,
            messages=inference_pb2.Messages(
                messages=[inference_pb2.Message(role="user", content="hello there")]
            ),
            stopping=generation_pb2.StoppingOptions(max_tokens=9),
            sampling=generation_pb2.SamplingOptions(temperature=0),
        )
        responses = [response async for response in stub.Generate(request, timeout=30)]
    assert "".join(response.text for response in responses) == rest.text
    assert responses[-1].usage.completion_tokens == 9


async def test_a_model_without_decode_workers_is_not_listed_and_comes_back(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    for name in DECODE_WORKERS:
        deployment.cluster.kill(name, signal.SIGTERM)

    async def listed() -> list[str]:
        return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]

    async def is_unlisted() -> bool:
        return not await listed()

    await eventually(is_unlisted)
    assert (await client.get("/health")).status_code == 503
    answer = await asyncio.to_thread(deployment.chat, "Anybody there?")
    # Its prefill workers still announce it: known, not ready.
    assert answer.status == 503
    assert "retry-after" in answer.headers
    for name in DECODE_WORKERS:
        await restart(deployment, name)
    await eventually(listed)
    assert (await asyncio.to_thread(deployment.chat, "Anybody there?")).status == 200
