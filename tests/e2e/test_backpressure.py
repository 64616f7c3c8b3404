"""Clients that do not read what they asked for: nobody's memory pays for them, and nobody waits."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from deploy.local.topology import HOST
from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from tests.e2e.running import Running, running, stream
from tests.fixtures.eventually import eventually

pytestmark = pytest.mark.timeout(180)

STALLED_STREAMS = 80
STALLED_CALLS = 5
"""On the frontend and on the router each."""
STALLED_TOKENS = 6_000
SLOW_TOKENS = 400
NORMAL_TOKENS = 30

UNREAD_TOKENS = (STALLED_STREAMS + 2 * STALLED_CALLS) * STALLED_TOKENS

MAX_GROWTH_BYTES = {
    # A token in an inbox takes 40 bytes; in the text of an event, which is not made before there is
    # somebody to send it to, 165.
    "frontend-0": 100 * UNREAD_TOKENS,
    "router-0": 8 << 20,
    # These keep the books of all those tokens' KV blocks.
    "decode_worker-0": 48 << 20,
    "kv_indexer-0": 24 << 20,
}


@pytest.fixture
def deployment(tmp_path: Path, tokenizer_folder: Path) -> Iterator[Running]:
    with running(
        tmp_path,
        engine="sim",
        model=tokenizer_folder,
        sim_step_ms=1,
        prefill=0,
        max_model_len_tokens=2 * STALLED_TOKENS,
    ) as it:
        yield it


@pytest.fixture
async def client(deployment: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:
        yield client


def resident_bytes(deployment: Running, service: str) -> int:
    return int(psutil.Process(deployment.cluster.process(service).pid).memory_info().rss)


def chat(deployment: Running, prompt: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": deployment.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def open_stalled_stream(deployment: Running, prompt: str) -> socket.socket:
    """A client whose kernel takes a few kilobytes, and that reads none of them."""
    port = deployment.cluster.process("frontend-0").spec.ports["http"]
    body = json.dumps(chat(deployment, prompt, STALLED_TOKENS)).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((HOST, port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n"
    client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return client


def stopping(max_tokens: int) -> generation_pb2.StoppingOptions:
    return generation_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=True)


async def read_slowly(client: httpx.AsyncClient, deployment: Running, number: int) -> int:
    """A few events at a time; its tokens in the end."""
    tokens = 0
    async for event in stream(client, chat(deployment, f"slow {number}", SLOW_TOKENS)):
        await asyncio.sleep(0.002)
        if event["usage"]:
            tokens = event["usage"]["completion_tokens"]
    return tokens


async def read_at_once(client: httpx.AsyncClient, deployment: Running, number: int) -> int:
    events = [
        event async for event in stream(client, chat(deployment, f"normal {number}", NORMAL_TOKENS))
    ]
    return int(events[-1]["usage"]["completion_tokens"])


async def test_what_clients_do_not_read_costs_little_and_delays_nobody(
    deployment: Running, client: httpx.AsyncClient
) -> None:
    async def gauge(service: str, name: str) -> float:
        return await asyncio.to_thread(deployment.metric, service, name)

    async def in_flight() -> float:
        text = (await client.get("/metrics")).text
        [line] = [
            line
            for line in text.splitlines()
            if line.startswith("switchgear_frontend_in_flight_requests ")
        ]
        return float(line.rpartition(" ")[2])

    async def is_engine_done() -> bool:
        return await gauge("decode_worker-0", "switchgear_worker_running_requests") == 0

    # Connections, sessions and caches as they are in use.
    await asyncio.gather(*(read_at_once(client, deployment, -number) for number in range(1, 33)))
    before = {service: resident_bytes(deployment, service) for service in MAX_GROWTH_BYTES}

    with ExitStack() as sockets:
        for number in range(STALLED_STREAMS):
            sockets.enter_context(open_stalled_stream(deployment, f"stalled {number}"))
        async with AsyncExitStack() as calls:
            frontend: inference_pb2_grpc.InferenceServiceAsyncStub = (
                inference_pb2_grpc.InferenceServiceStub(
                    await calls.enter_async_context(deployment.channel("frontend-0"))
                )
            )
            router: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(
                await calls.enter_async_context(deployment.channel("router-0"))
            )
            never_read: list[grpc.aio.UnaryStreamCall[object, object]] = []
            for number in range(STALLED_CALLS):
                never_read += [
                    frontend.Generate(  # type: ignore[list-item]
                        inference_pb2.GenerateRequest(
                            model=deployment.model,
                            text=f"stalled {number}",
                            stopping=stopping(STALLED_TOKENS),
                        )
                    ),
                    router.Generate(  # type: ignore[list-item]
                        router_pb2.GenerateRequest(
                            generation=generation_pb2.Generation(
                                request_id=f"stalled-{number}",
                                model=deployment.model,
                                token_ids=range(100 + number, 150),
                                stopping=stopping(STALLED_TOKENS),
                            )
                        )
                    ),
                ]
            slow = asyncio.gather(*(read_slowly(client, deployment, n) for n in range(10)))
            for round_number in range(5):
                normal = await asyncio.gather(
                    *(read_at_once(client, deployment, 40 * round_number + n) for n in range(40))
                )
                assert normal == [NORMAL_TOKENS] * 40
            assert await slow == [SLOW_TOKENS] * 10

            async with asyncio.timeout(120):
                while not await is_engine_done():  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.1)

            # All tokens are there, and wait for their readers: in chunks as long as the load has
            # made them, so that how many answers fit into the kernel's buffers can't be told.
            grown = {
                service: resident_bytes(deployment, service) - was
                for service, was in before.items()
            }
            for service, most in MAX_GROWTH_BYTES.items():
                assert grown[service] < most, grown
            for call in never_read:
                call.cancel()

    async def is_all_freed() -> bool:
        return (
            await in_flight() == 0
            and await gauge("router-0", "switchgear_router_busy_sessions") == 0
            and await gauge("decode_worker-0", "switchgear_worker_active_kv_blocks") == 0
        )

    await eventually(is_all_freed)
