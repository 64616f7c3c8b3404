"""Serving one session stream: a reader for commands, and one writer that sends what is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from libs.common.errors import ProtocolViolation
from libs.common.tasks import background

Request = TypeVar("Request")
Response = TypeVar("Response")

FIRST_MESSAGE_SECONDS = 10.0
"""How long a client may take to say what its session is to be like."""

LAST_WRITE_SECONDS = 1.0
"""How long a message that is being written when the stream ends may still take."""


async def first_message(requests: AsyncIterator[Request]) -> Request | None:
    """What a session begins with; None when the client ended it at once.

    Raises ProtocolViolation when nothing comes.
    """
    try:
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
            return await anext(aiter(requests), None)
    except TimeoutError:
        raise ProtocolViolation(f"nothing came within {FIRST_MESSAGE_SECONDS:g} s") from None


async def serve_duplex(
    requests: AsyncIterator[Request],
    context: grpc.aio.ServicerContext[Any, Any],
    *,
    command: Callable[[Request], None],
    take: Callable[[], Response | None],
    news: asyncio.Event,
    closing: asyncio.Event,
) -> None:
    """Runs until the client ends the stream, or `closing` is set.

    `command` takes each request; what it raises ends the stream. `take` gives the next message or
    None; it is asked whenever `news` is set.
    """
    is_ending = False

    async def read() -> None:
        async for request in requests:
            command(request)

    async def write() -> None:
        try:
            while not is_ending:
                await news.wait()
                news.clear()
                while not is_ending and (response := take()) is not None:
                    await context.write(response)
        except grpc.aio.BaseError:
            return  # The client is gone, as the reader is about to find out.

    async with background(write()) as writer, background(read()) as reader:
        closed = asyncio.create_task(closing.wait())
        try:
            await asyncio.wait({reader, writer, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
            # grpc can't send a status while a message is on its way.
            is_ending = True
            news.set()
            await asyncio.wait({writer}, timeout=LAST_WRITE_SECONDS)
