"""An HTTP client that costs little: one connection, one request at a time, httptools to parse."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httptools

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class _Parsing:
    """What httptools calls."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_complete = False

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        self.is_complete = True


class HttpConnection:
    """Opened when it is first needed, and again after it was closed by either side."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str) -> Answer:
        return await self._exchange(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())

    async def post(self, path: str, body: bytes) -> Answer:
        return await self._exchange(self._post(path, body))

    async def post_and_leave(self, path: str, body: bytes, *, after_bytes: int) -> None:
        """Breaks the connection after so many bytes of the answer's body, or at its end."""
        reader = await self._send(self._post(path, body))
        parsing = _Parsing()
        parser = httptools.HttpResponseParser(parsing)
        while not parsing.is_complete and len(parsing.body) < after_bytes:
            parser.feed_data(await self._read(reader))
        self.abort()

    async def post_and_leave_at_once(self, path: str, body: bytes, *, after_seconds: float) -> None:
        """Breaks the connection so long after the request, whatever has come by then."""
        reader = await self._send(self._post(path, body))
        try:
            async with asyncio.timeout(after_seconds):
                while await reader.read(_READ_BYTES):
                    pass
        except TimeoutError:
            pass
        self.abort()

    def abort(self) -> None:
        """What has not been read is dropped, and the other side hears a reset."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    def _post(self, path: str, body: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def _exchange(self, request: bytes) -> Answer:
        """Raises ConnectionError when the other side closes before the end."""
        try:
            reader = await self._send(request)
            parsing = _Parsing()
            parser = httptools.HttpResponseParser(parsing)
            while not parsing.is_complete:
                parser.feed_data(await self._read(reader))
            if not parser.should_keep_alive():
                self.abort()
            return Answer(parser.get_status_code(), bytes(parsing.body))
        except BaseException:
            self.abort()
            raise

    async def _send(self, request: bytes) -> asyncio.StreamReader:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            self.abort()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(request)
        await self._writer.drain()
        return self._reader

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        data = await reader.read(_READ_BYTES)
        if not data:
            raise ConnectionError("closed before the end of the answer")
        return data
