"""What a running `docker-compose up` has to do. `make test-compose` starts one and runs this."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess

import grpc
import httpx
import openai
import pytest

from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.running import stream, text_of
from tests.fixtures.eventually import eventually

ADDRESS = os.environ["SWITCHGEAR_ADDRESS"]
MODEL = os.environ["MODEL_NAME"]
PROJECT = os.environ["COMPOSE_PROJECT_NAME"]
DECODE_WORKER = os.environ["DECODE_WORKER"]
URL = f"http://{ADDRESS}"
REPLACED_SECONDS = 90
"""For a container to be started again and found healthy, on a busy machine."""


def docker(*arguments: str) -> list[str]:
    """The lines that the command prints."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def containers(service: str) -> list[str]:
    """The running containers of a service."""
    labels = {"project": PROJECT, "service": service}
    filters = [f"--filter=label=com.docker.compose.{key}={value}" for key, value in labels.items()]
    return docker("ps", "--quiet", "--no-trunc", *filters)


def chat(max_tokens: int, prompt: str = "hello") -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }


async def answers() -> bool:
    async with httpx.AsyncClient(base_url=URL, timeout=30) as client:
        try:
            answer = await client.post("/v1/chat/completions", json=chat(1))
        except httpx.TransportError:
            return False  # Docker listens for an Envoy that is still starting.
        return answer.status_code == 200


@pytest.fixture(autouse=True)
async def serving() -> None:
    await eventually(answers)


async def test_the_official_client_streams_through_envoy() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        chunks = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        usages = [chunk.usage async for chunk in chunks if chunk.usage]
    assert len(usages) == 1
    assert 0 < usages[0].completion_tokens <= 12


async def test_grpc_generates_through_envoy() -> None:
    async with grpc.aio.insecure_channel(ADDRESS) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = (
            inference_pb2_grpc.InferenceServiceStub(channel)
        )
        request = inference_pb2.GenerateRequest(model=MODEL, text="Once upon a time")
        request.stopping.max_tokens = 7
        responses = [response async for response in stub.Generate(request, timeout=60)]
    assert responses[-1].usage.completion_tokens == 7


async def test_a_long_prompt_is_prefilled_in_another_container() -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 60
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
        answer = await client.post("/v1/chat/completions", json=chat(4, prompt))
    assert answer.status_code == 200
    assert answer.headers["x-switchgear-prefill-worker"].startswith("prefill_worker-")


async def test_a_killed_frontend_is_survived() -> None:
    [victim, *others] = containers("frontend")
    assert others, "two frontends are needed"
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:

        async def one() -> int:
            return (await client.post("/v1/chat/completions", json=chat(30))).status_code

        asked = [asyncio.create_task(one()) for _ in range(10)]
        await asyncio.to_thread(docker, "kill", victim)
        assert await asyncio.gather(*asked) == [200] * 10
        assert await asyncio.gather(*(one() for _ in range(10))) == [200] * 10
    # Docker restarts what fails, not what somebody killed by hand.
    await asyncio.to_thread(docker, "start", victim)


async def test_an_envoy_that_is_stopped_lets_streams_end() -> None:
    [envoy] = containers("envoy")
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
        stopping, text = None, ""
        async for event in stream(client, chat(300)):
            text += text_of(event)
            if text and stopping is None:
                stopping = asyncio.create_task(
                    asyncio.to_thread(docker, "stop", "--time=40", envoy)
                )
    assert stopping is not None
    await stopping
    assert docker("inspect", "--format={{.State.ExitCode}}", envoy) == ["0"]
    docker("start", envoy)


@pytest.mark.skipif(
    len(containers(DECODE_WORKER)) < 2, reason="with one decode worker its death ends a stream"
)
async def test_a_decode_worker_that_crashes_costs_no_token_and_is_started_again() -> None:
    async with httpx.AsyncClient(base_url=URL, timeout=60) as client:
        body = chat(600, "Tell me a long story.")
        expected = "".join([text_of(event) async for event in stream(client, body)])
        got, crashed = "", False
        async with client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}
        ) as response:
            # Workers are named for their host, which is their container's id.
            victim = response.headers["x-switchgear-decode-worker"].removeprefix("decode_worker-")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    got += text_of(json.loads(line.removeprefix("data: ")))
                if got and not crashed:
                    crashed = True
                    await asyncio.to_thread(crash, victim)
    assert got == expected

    async with asyncio.timeout(REPLACED_SECONDS):
        while docker("inspect", "--format={{.State.Health.Status}}", victim) != ["healthy"]:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    assert int(docker("inspect", "--format={{.RestartCount}}", victim)[0]) >= 1


def crash(container: str) -> None:
    """Kills all processes in it but its init, which ends when its child has."""
    kill = ["docker", "exec", container, "sh", "-c", "kill -KILL -1"]
    subprocess.run(kill, capture_output=True, timeout=60, check=False)
