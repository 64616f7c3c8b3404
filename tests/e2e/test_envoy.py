"""A deployment of real processes behind a real Envoy: one port for REST and gRPC."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from tests.e2e.running import Running, running, stream, text_of
from tests.fixtures.eventually import eventually, until

FRONTENDS = ("frontend-0", "frontend-1")


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        flags={"frontend": ("--response-store", "nats")},
        sim_step_ms=20,
        frontends=2,
        routers=2,
        envoy=True,
    ) as it:
        yield it


@pytest.fixture
async def channel(deployment: Running) -> AsyncIterator[grpc.aio.Channel]:
    port = deployment.cluster.process("envoy-0").spec.ports["http"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


async def metric(deployment: Running, frontend: str, name: str) -> float:
    """The sum of a metric's samples of one frontend."""
    port = deployment.cluster.process(frontend).spec.ports["http"]
    async with httpx.AsyncClient(timeout=10) as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    samples = [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


async def test_the_official_client_streams_through_envoy(deployment: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        chunks = await client.chat.completions.create(
            model=deployment.model,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        usages = [chunk.usage async for chunk in chunks if chunk.usage]
    assert [usage.completion_tokens for usage in usages] == [12]


async def test_a_conversation_goes_on_through_any_frontend_and_outlives_nats(
    deployment: Running,
) -> None:
    def port(frontend: str) -> int:
        return deployment.cluster.process(frontend).spec.ports["http"]

    async def ask(frontend: str, **fields: object) -> httpx.Response:
        body = {"model": deployment.model, "max_output_tokens": 4, "store": True, **fields}
        url = f"http://127.0.0.1:{port(frontend)}/v1/responses"
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.post(url, json=body)

    one, other = FRONTENDS
    first = await ask(one, input="My name is Ada.")
    assert first.status_code == 200, first.text
    second = await ask(other, input="And yours?", previous_response_id=first.json()["id"])
    assert second.status_code == 200, second.text
    assert second.json()["usage"]["input_tokens"] > first.json()["usage"]["input_tokens"]

    deployment.cluster.kill("nats-0")
    deployment.cluster.restart("nats-0", 20)
    path = f"/v1/responses/{second.json()['id']}"
    async with httpx.AsyncClient(base_url=deployment.url, timeout=30) as client:

        async def is_back() -> bool:
            return (await client.get(path)).status_code == 200

        # Through Envoy, that is either frontend's: each finds its way back to NATS by itself.
        for _ in range(4):
            await eventually(is_back)
        listed = (await client.get(f"{path}/input_items", params={"order": "asc"})).json()["data"]
        assert [item["role"] for item in listed] == ["user", "assistant", "user"]
        assert (await client.delete(path)).json()["deleted"] is True
        assert (await client.get(path)).status_code == 404


async def test_events_arrive_while_the_answer_is_made(deployment: Running) -> None:
    body = {
        "model": deployment.model,
        "messages": [{"role": "user", "content": "A very long answer, please."}],
        "max_tokens": 3000,
    }
    # A minute of tokens: held back, none would come within the client's time.
    async with httpx.AsyncClient(base_url=deployment.url, timeout=20) as client:
        async for event in stream(client, body):
            if text_of(event):
                return
    raise AssertionError("no token came")


async def test_grpc_generates_on_the_same_port(
    deployment: Running, channel: grpc.aio.Channel
) -> None:
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
        channel
    )
    models = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    assert [listed.model for listed in models.models] == [deployment.model]
    request = inference_pb2.GenerateRequest(model=deployment.model, text="hello")
    request.stopping.max_tokens = 7
    responses = [response async for response in stub.Generate(request, timeout=30)]
    assert responses[-1].usage.completion_tokens == 7


async def test_calls_of_one_connection_are_spread_over_the_frontends(deployment: Running) -> None:
    tokens = "switchgear_frontend_completion_tokens_total"
    before = [await metric(deployment, name, tokens) for name in FRONTENDS]
    async with httpx.AsyncClient(base_url=deployment.url, timeout=30) as client:
        body = {
            "model": deployment.model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 1,
        }

        async def are_all_reached() -> bool:
            (await client.post("/v1/chat/completions", json=body)).raise_for_status()
            after = [await metric(deployment, name, tokens) for name in FRONTENDS]
            return all(new > old for old, new in zip(before, after, strict=True))

        await eventually(are_all_reached)


async def test_routers_are_reached_on_the_same_port(channel: grpc.aio.Channel) -> None:
    stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
    response = await stub.GetSettings(router_pb2.GetSettingsRequest(), timeout=10)
    assert response.ByteSize()
    health = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(), timeout=10
    )
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_what_envoy_does_not_offer_is_refused_in_our_shape(deployment: Running) -> None:
    response = httpx.get(f"{deployment.url}/metrics", timeout=10)
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "Unknown request URL: GET /metrics",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
    }


def test_the_access_log_names_request_and_trace(deployment: Running) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {
        "x-request-id": "of-this-test",
        "traceparent": f"00-{trace_id}-b7ad6b7169203331-01",
    }
    answer = deployment.chat("hello", headers)
    assert answer.headers["x-request-id"] == "of-this-test"
    answer = deployment.chat("hello")
    unnamed = answer.headers["x-request-id"]

    def entries() -> dict[str, dict[str, object]]:
        log = deployment.cluster.log_path("envoy-0").read_text()
        found = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        return {entry["request_id"]: entry for entry in found}

    async def are_written() -> bool:
        return {"of-this-test", unnamed} <= entries().keys()

    asyncio.run(eventually(are_written))
    named = entries()["of-this-test"]
    assert named["trace_id"] == trace_id
    assert named["status"] == 200
    assert str(named["decode_worker"]).startswith("decode_worker-")
    assert entries()[unnamed]["trace_id"]


async def test_of_two_frontends_one_may_die(deployment: Running) -> None:
    body = {
        "model": deployment.model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100,
    }

    async def is_busy() -> bool:
        return await metric(deployment, "frontend-0", "switchgear_frontend_in_flight_requests") > 0

    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:

        async def one() -> int:
            return (await client.post("/v1/chat/completions", json=body)).status_code

        running_ones = [asyncio.create_task(one()) for _ in range(20)]
        await eventually(is_busy)
        deployment.cluster.kill("frontend-0", signal.SIGKILL)
        # Nothing of an answer had come yet, so they are asked again, of the other one.
        assert await asyncio.gather(*running_ones) == [200] * 20
        assert await asyncio.gather(*(one() for _ in range(20))) == [200] * 20
    await asyncio.to_thread(deployment.cluster.restart, "frontend-0", 60)


async def test_of_two_frontends_one_may_be_restarted_and_nobody_notices(
    deployment: Running,
) -> None:
    body = {
        "model": deployment.model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "user": "x" * 300_000,  # More than Envoy otherwise holds of a connection.
    }
    answers: Counter[str] = Counter()
    is_ending = asyncio.Event()
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:

        async def ask() -> None:
            while not is_ending.is_set():
                response = await client.post("/v1/chat/completions", json=body)
                answers["" if response.is_success else response.text] += 1

        async with asyncio.TaskGroup() as clients:
            for _ in range(8):
                clients.create_task(ask())
            await until(lambda: answers.total() > 50)
            await asyncio.to_thread(deployment.cluster.restart, "frontend-0", 60)
            is_ending.set()
    assert answers.keys() == {""}


async def test_with_no_frontend_envoy_answers_in_our_shape(
    deployment: Running, channel: grpc.aio.Channel
) -> None:
    for name in FRONTENDS:
        deployment.cluster.kill(name, signal.SIGKILL)
    async with httpx.AsyncClient(base_url=deployment.url, timeout=30) as client:
        response = await client.get("/v1/models", headers={"x-request-id": "nobody-home"})
    assert response.status_code == 503
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "no_frontend")
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-request-id"] == "nobody-home"
    assert response.headers["content-type"] == "application/json"

    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
        channel
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "{" not in (refused.value.details() or "")

    for name in FRONTENDS:
        await asyncio.to_thread(deployment.cluster.restart, name, 60)

    async def serves_again() -> bool:
        return (await asyncio.to_thread(deployment.chat, "hello")).status == 200

    await eventually(serves_again)
