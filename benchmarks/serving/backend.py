"""A server of OpenAI's chats without a model, for gateways that pass HTTP on:
`python -m benchmarks.serving.backend --port 9000 --model NAME --step-ms 6`.

It is one engine: all its sequences get their next token together, once a step, and those beyond
`RUNNING_REQUESTS` wait for a place. It neither tokenises nor applies a template, its tokens are all
the same word, and nobody is told what it has cached: it costs less than a server of a model does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections import deque
from typing import Annotated, Any, cast

import httptools
import typer
import uvloop

RUNNING_REQUESTS = 256
_TOKEN = " word"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Sequence:
    """One answer on its way to a connection."""

    __slots__ = ("_connection", "_event", "_left_tokens", "_request", "_template")

    def __init__(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self._connection = connection
        self._request = request
        self._left_tokens: int = request["max_tokens"]
        self._template = {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request["model"],
        }
        self._event = _event({**self._template, "choices": [_choice({"content": _TOKEN}, None)]})
        if request.get("stream"):
            first = {"role": "assistant", "content": ""}
            event = _event({**self._template, "choices": [_choice(first, None)]})
            connection.write(_HEAD + event)

    def step(self) -> bool:
        """Gives it a token; whether that was the last, or nobody wants it any more."""
        if self._connection.is_closed:
            return True
        self._left_tokens -= 1
        is_last = self._left_tokens <= 0
        if self._request.get("stream"):
            self._connection.write(self._event + self._end() if is_last else self._event)
        elif is_last:
            self._connection.write(self._whole())
        if is_last:
            self._connection.answered()
        return is_last

    @property
    def _usage(self) -> dict[str, int]:
        tokens = self._request["max_tokens"]
        # It counts no prompt's tokens.
        return {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}

    def _end(self) -> bytes:
        end = _event({**self._template, "choices": [_choice({}, "length")]})
        if (self._request.get("stream_options") or {}).get("include_usage"):
            end += _event({**self._template, "choices": [], "usage": self._usage})
        return end + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _whole(self) -> bytes:
        text = _TOKEN * self._request["max_tokens"]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        answer = {**self._template, "object": "chat.completion", "choices": [choice]}
        return _json({**answer, "usage": self._usage})


def _choice(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _event(fields: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _json(fields: dict[str, Any], status: str = "200 OK") -> bytes:
    body = json.dumps(fields, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Engine:
    """Steps as long as there are sequences."""

    def __init__(self, model: str, step_seconds: float) -> None:
        self.model = model
        self._step_seconds = step_seconds
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._wake = asyncio.Event()
        self._numbers = itertools.count()

    def submit(self, connection: Connection, request: dict[str, Any]) -> None:
        self._waiting.append(Sequence(connection, next(self._numbers), request))
        self._wake.set()

    async def run(self) -> None:
        """Steps follow one another without a gap; a loop too busy to keep up falls behind."""
        loop = asyncio.get_running_loop()
        step_end = loop.time()
        while True:
            while self._waiting and len(self._running) < RUNNING_REQUESTS:
                self._running.append(self._waiting.popleft())
            if not self._running:
                self._wake.clear()
                await self._wake.wait()
                step_end = loop.time()
                continue
            step_end = max(step_end + self._step_seconds, loop.time())
            await asyncio.sleep(step_end - loop.time())
            self._running = [sequence for sequence in self._running if not sequence.step()]


class Connection(asyncio.Protocol):
    """One request at a time, as HTTP/1.1 has it."""

    _transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = bytearray()
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def answered(self) -> None:
        if not self._parser.should_keep_alive():
            self._transport.close()

    # What httptools calls.

    def on_url(self, url: bytes) -> None:
        self._path = url
        self._body.clear()

    def on_body(self, part: bytes) -> None:
        self._body += part

    def on_message_complete(self) -> None:
        match self._path:
            case b"/v1/chat/completions":
                self._engine.submit(self, json.loads(self._body))
            case b"/v1/models":
                listed = {"id": self._engine.model, "object": "model", "owned_by": "benchmark"}
                self.write(_json({"object": "list", "data": [listed]}))
            case b"/health":
                self.write(_json({}))
            case _:
                self.write(_json({"error": {"message": "not here"}}, "404 Not Found"))


async def serve(port: int, model: str, step_seconds: float) -> None:
    """Serves until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    engine = Engine(model, step_seconds)
    async with await loop.create_server(
        lambda: Connection(engine), "127.0.0.1", port, backlog=1024
    ):
        steps = asyncio.create_task(engine.run())
        await asyncio.wait(
            {steps, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        steps.cancel()


def main(
    port: Annotated[int, typer.Option()],
    model: Annotated[str, typer.Option()],
    step_ms: Annotated[float, typer.Option(min=0.1)] = 6.0,
) -> None:
    uvloop.run(serve(port, model, step_ms / 1_000))


if __name__ == "__main__":
    typer.run(main)
