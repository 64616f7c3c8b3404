"""Moves prompts' KV between simulated engines: over real TCP, with the bytes left out.

The engine that pulls opens a connection and speaks first; each message is one line of JSON.

    PullRequest  ->
                 <-  Grant, or Refusal and the connection ends
      ... the time that the bytes would take ...
    Done         ->
                 <-  Released: the blocks were the prompt's until now; or Refusal
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Protocol, TypeVar

import msgspec

from libs.common import logs
from libs.common.errors import TransferFailed
from libs.engine.sim.core.scheduler import Pull

log = logs.get(__name__)

_MESSAGE_LIMIT_BYTES = 4_096

MessageT = TypeVar("MessageT", bound=msgspec.Struct)
Count = Annotated[int, msgspec.Meta(ge=0)]


class PullRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks for the last `blocks` blocks of a computed prompt."""

    session_id: str
    last_sequence_hash: Count
    blocks: Count


class Grant(msgspec.Struct, tag=True, frozen=True):
    """What will be sent."""

    blocks: Count
    bytes: Count


class Done(msgspec.Struct, tag=True, frozen=True):
    """All blocks have arrived and can be freed."""


class Released(msgspec.Struct, tag=True, frozen=True):
    """They were the right ones, and are freed."""


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """Nothing can be had. The message is for people."""

    message: str


class KvKeeper(Protocol):
    """The engine that is pulled from. Its methods raise TransferFailed to refuse."""

    def offer(self, session_id: str, last_sequence_hash: int) -> int:
        """Blocks of the prompt, kept from now on for as long as a transfer may take."""

    def release(self, session_id: str) -> None:
        """Frees a prompt that was pulled."""


class TransferServer:
    """Lets other engines pull. Each connection is ended after `timeout_seconds`."""

    def __init__(
        self,
        keeper: KvKeeper,
        *,
        block_bytes: int,
        timeout_seconds: float,
    ) -> None:
        self._keeper = keeper
        self._block_bytes = block_bytes
        self._timeout_seconds = timeout_seconds
        self._server: asyncio.Server | None = None
        self._conversations: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> str:
        """Listens; returns the endpoint, as host:port."""
        self._server = await asyncio.start_server(
            self._accept, host, port, limit=_MESSAGE_LIMIT_BYTES
        )
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Ends all connections. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.create_task(self._converse(reader, writer))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds), _closing(writer):
                await self._serve(reader, writer)
        except TransferFailed as error:
            log.warning("kv pull refused", reason=error.message)
        except (OSError, TimeoutError) as error:
            log.warning("kv pull broke off", reason=repr(error))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _receive(reader, PullRequest)
            blocks = self._keeper.offer(request.session_id, request.last_sequence_hash)
            if request.blocks > blocks:
                raise TransferFailed(f"asked for {request.blocks} of {blocks} blocks")
            grant = Grant(
                blocks=request.blocks,
                bytes=request.blocks * self._block_bytes,
            )
            await _send(writer, grant)
            await _receive(reader, Done)
            self._keeper.release(request.session_id)
        except TransferFailed as error:
            await _send(writer, Refusal(error.message))
            raise
        await _send(writer, Released())


async def pull(pull: Pull, *, bytes_per_second: float, timeout_seconds: float) -> int:
    """Waits for as long as the transfer takes; returns its bytes.

    Raises TransferFailed when the peer is not there, refuses, or takes longer than the timeout.
    """
    session = pull.kv_session
    try:
        host, _, port = session.endpoints[0].rpartition(":")
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(
                host, int(port), limit=_MESSAGE_LIMIT_BYTES
            )
            async with _closing(writer):
                await _send(
                    writer,
                    PullRequest(
                        session.session_id, session.last_sequence_hash, pull.missing_blocks
                    ),
                )
                grant = await _receive(reader, Grant)
                if grant.blocks != pull.missing_blocks:
                    raise TransferFailed(
                        f"{grant.blocks} blocks granted of {pull.missing_blocks} asked for"
                    )
                await asyncio.sleep(grant.bytes / bytes_per_second)
                await _send(writer, Done())
                await _receive(reader, Released)
                return grant.bytes
    except (OSError, TimeoutError, ValueError) as error:
        # ValueError: the endpoint's port is no number.
        raise TransferFailed(f"pull from {session.endpoints[0]} failed: {error!r}") from error


async def _send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    writer.write(msgspec.json.encode(message) + b"\n")
    await writer.drain()


async def _receive(reader: asyncio.StreamReader, expected: type[MessageT]) -> MessageT:
    """The next message. Raises TransferFailed for any other than the expected kind."""
    try:
        line = await reader.readuntil(b"\n")
        message: MessageT | Refusal = msgspec.json.decode(line, type=expected | Refusal)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, msgspec.DecodeError) as error:
        raise TransferFailed(f"no {expected.__name__} from the peer: {error}") from error
    if isinstance(message, Refusal):
        raise TransferFailed(f"refused by the peer: {message.message}")
    return message


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
