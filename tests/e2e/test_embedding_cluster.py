"""A simulated deployment of real processes that embeds beside one that generates."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from libs.engine.sim.core.embedding import embedding
from switchgear.common.v1 import generation_pb2
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from switchgear_client import Client
from tests.e2e.running import LONG_PROMPT, Running, running
from tests.fixtures.eventually import eventually, until

DIMENSIONS = 384
MODEL = "test-model-embed"
WORKERS = ("decode_worker-1", "decode_worker-2")


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"), engine="sim", model=tokenizer_folder, embed=2, prefill=1
    ) as it:
        yield it


@pytest.fixture
async def client(deployment: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def texts(count: int, text: str = "") -> list[str]:
    return [f"{text}{number} and so on" for number in range(count)]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def expected(deployment: Running, text: str) -> list[float]:
    """By definition, of the tokens that the frontend says."""
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:
        answer = await client.post("/tokenize", json={"model": MODEL, "prompt": text})
    return [*memoryview(embedding(answer.json()["tokens"], DIMENSIONS)).cast("f")]


async def test_one_deployment_generates_and_embeds(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    assert [model.id async for model in client.models.list()] == [deployment.model, MODEL]
    made = await client.embeddings.create(model=MODEL, input=["A cat sat", "The cat sat"])
    first, second = (item.embedding for item in made.data)
    assert first == pytest.approx(await expected(deployment, "A cat sat"))
    assert math.hypot(*first) == pytest.approx(1, abs=1e-5)
    [other] = (await client.embeddings.create(model=MODEL, input="Stock prices")).data
    assert cosine(first, second) > 0.4 > cosine(first, other.embedding)
    assert deployment.chat("hello").status == 200
    with pytest.raises(openai.BadRequestError, match="does not support embeddings"):
        await client.embeddings.create(model=deployment.model, input="a")
    with pytest.raises(openai.BadRequestError, match="only supports embeddings"):
        await client.completions.create(model=MODEL, prompt="a")


async def test_many_inputs_are_spread_over_the_workers_and_come_back_in_order(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    before = [deployment.metric(name, "switchgear_worker_requests_total") for name in WORKERS]
    inputs = texts(2048)
    made = await client.embeddings.create(model=MODEL, input=inputs)
    assert [item.index for item in made.data] == [*range(2048)]
    for index in (0, 1000, 2047):
        assert made.data[index].embedding == pytest.approx(
            await expected(deployment, inputs[index])
        )
    done = [deployment.metric(name, "switchgear_worker_requests_total") for name in WORKERS]
    shares = [after - earlier for after, earlier in zip(done, before, strict=True)]
    assert sum(shares) == 2048
    assert min(shares) > 500


async def test_the_grpc_api_gives_the_same_vectors(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    port = deployment.cluster.process("frontend-0").spec.ports["grpc"]
    async with Client(f"127.0.0.1:{port}") as grpc_client:
        vectors = await grpc_client.embed(MODEL, ["one", "two"])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await grpc_client.embed(MODEL, ["one"], dimensions=5)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    made = await client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [item.embedding for item in made.data] == [pytest.approx(one) for one in vectors]


async def test_a_prompt_goes_where_its_beginning_is_and_never_to_a_prefill_worker(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    async def explained() -> router_pb2.Explanation:
        async with deployment.channel("router-0") as channel:
            stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(
                channel
            )
            request = router_pb2.ExplainDecisionRequest(limit=1)
            return (await stub.ExplainDecision(request)).explanations[0]

    prompt = "Instead. " + LONG_PROMPT
    await client.embeddings.create(model=MODEL, input=prompt)
    first = await explained()
    assert first.handover == router_pb2.HANDOVER_LOCAL

    async def is_known() -> bool:
        await client.embeddings.create(model=MODEL, input=prompt)
        again = await explained()
        assert again.decode.worker.name == first.decode.worker.name
        return again.decode.predicted_cached_tokens > 500

    await eventually(is_known)


async def test_inputs_of_a_worker_that_is_killed_are_embedded_by_the_other(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    inputs = texts(48, LONG_PROMPT * 3)
    whole = await client.embeddings.create(model=MODEL, input=inputs)
    # Of another salt nothing is cached.
    asking = asyncio.create_task(
        client.embeddings.create(
            model=MODEL, input=inputs, extra_body={"cache_salt": "computed anew"}
        )
    )

    async def is_busy() -> bool:
        status = await status_of(deployment, WORKERS[0])
        return status.load.running_requests > 0

    try:
        await eventually(is_busy)
        deployment.cluster.kill(WORKERS[0], signal.SIGKILL)
        made = await asking
        assert [item.embedding for item in made.data] == [item.embedding for item in whole.data]
        assert deployment_migrations(deployment) > 0
    finally:
        await asyncio.to_thread(deployment.cluster.restart, WORKERS[0], 60)


def deployment_migrations(deployment: Running) -> float:
    """Requests that the frontend submitted again."""
    total = 0.0
    for line in httpx.get(f"{deployment.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("switchgear_frontend_migrations_total{"):
            total += float(line.rpartition(" ")[2])
    return total


async def status_of(deployment: Running, name: str) -> worker_pb2.GetStatusResponse:
    async with deployment.channel(name) as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        return await stub.GetStatus(worker_pb2.GetStatusRequest())


async def test_a_client_that_leaves_frees_the_workers(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    asking = asyncio.create_task(
        client.embeddings.create(model=MODEL, input=texts(48, "Leaving. " + LONG_PROMPT * 5))
    )

    async def running_requests() -> int:
        found = [await status_of(deployment, name) for name in WORKERS]
        return sum(len(status.request_ids) for status in found)

    async def is_busy() -> bool:
        return await running_requests() > 1

    async def is_idle() -> bool:
        return await running_requests() == 0

    await eventually(is_busy)
    asking.cancel()
    await eventually(is_idle)
    await until(asking.done)


async def test_a_deadline_ends_it(deployment: Running) -> None:
    port = deployment.cluster.process("frontend-0").spec.ports["grpc"]
    inputs = texts(48, "Late. " + LONG_PROMPT * 20)
    async with Client(f"127.0.0.1:{port}", deadline_seconds=0.5) as grpc_client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await grpc_client.embed(MODEL, inputs)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_routers_plain_call_embeds_too(deployment: Running) -> None:
    generation = generation_pb2.Generation(
        request_id="plain",
        model=MODEL,
        token_ids=range(1, 100),
        pooling=generation_pb2.PoolingOptions(task=generation_pb2.POOLING_TASK_EMBED),
    )
    async with deployment.channel("router-0") as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(generation=generation)
        [answer] = [response async for response in stub.Generate(request, timeout=30)]
    assert answer.pooled.values == embedding(range(1, 100), DIMENSIONS)
    assert answer.routed.decode_worker.name in WORKERS
