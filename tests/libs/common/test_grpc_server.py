"""What every channel is set to do about a peer that falls silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from libs.common.errors import DeadlineExceeded
from libs.common.grpc_server import ALIVE, CHANNEL_OPTIONS, end_with, serving
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

BRISK_OPTIONS = [
    (name, value // 20 if name.endswith(("keepalive_time_ms", "timeout_ms")) else value)
    for name, value in CHANNEL_OPTIONS
]
"""Those of every channel, with a twentieth of their patience."""


class Silent(worker_pb2_grpc.WorkerServiceServicer):
    """Opens a session and never says anything in it."""

    async def Session(
        self, requests: AsyncIterator[worker_pb2.SessionRequest], context: object
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        yield worker_pb2.SessionResponse()
        await asyncio.Event().wait()


@asynccontextmanager
async def way_to(port: int, is_open: asyncio.Event) -> AsyncIterator[int]:
    """A port that leads to another. While closed it takes bytes and passes none on, like the kernel
    of a process that is stopped."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await is_open.wait()
                writer.write(data)
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            pass_on(reader, there_writer), pass_on(there_reader, writer), return_exceptions=True
        )

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        is_open.set()


async def test_a_peer_that_takes_bytes_and_answers_none_is_given_up() -> None:
    servicer, is_open = Silent(), asyncio.Event()  # type: ignore[abstract]
    is_open.set()

    def add(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)

    async with (
        serving("127.0.0.1", 0, add, [], grace_seconds=0) as server,
        way_to(server.port, is_open) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=BRISK_OPTIONS) as channel,
    ):
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Session()
        await call.read()
        is_open.clear()
        async with asyncio.timeout(15):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class Gone:
    """The context of a call that has ended on the client's side, before the event loop heard it."""

    async def abort_with_status(self, status: grpc.Status) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_an_error_that_nobody_is_there_to_hear_ends_the_call_quietly() -> None:
    context: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        await end_with(context, "/service/Method", DeadlineExceeded("the deadline passed"))


async def test_a_server_is_alive_whether_it_takes_requests_or_not() -> None:
    async with (
        serving("127.0.0.1", 0, lambda _: None, [], grace_seconds=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        async def health(service: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            return int(answer.status)

        serving_status = health_pb2.HealthCheckResponse.SERVING
        for is_serving in (False, True, False):
            await server.set_serving(is_serving)
            assert (await health("") == serving_status) is is_serving
            assert await health(ALIVE) == serving_status
