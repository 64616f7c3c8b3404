"""A client that looks closely: when the first token came, and in how many events they all came.

wrk sees neither. A plain socket, since an HTTP library's own work would be part of the times.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving.scenarios import Body

_TEXT = re.compile(rb'"content":"[^"]')
"""Where an event carries text. Both systems write JSON without spaces."""
_READ_BYTES = 1 << 16
_ANSWER_TIMEOUT_SECONDS = 60.0


class ProbeError(Exception):
    """An answer that is not a whole and good one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer as the client saw it. Times count from sending the request."""

    first_text_seconds: float
    last_text_seconds: float
    total_seconds: float
    ended_at: float
    """In seconds since 1970."""
    text_events: int
    """Server-sent events with text; fewer than tokens where several share an event."""
    body: bytes
    """With the framing of HTTP's chunks in it."""

    @property
    def usage(self) -> dict[str, Any]:
        """Raises ProbeError when the answer names none."""
        for line in self.body.splitlines():
            start = line.find(b"{")
            if start >= 0 and b'"usage":{' in line:
                usage: dict[str, Any] = json.loads(line[start:])["usage"]
                return usage
        raise ProbeError(f"no usage in {self.body[-300:]!r}")


async def ask(url: str, request: str) -> Answer:
    """Sends one request on a new connection. Raises ProbeError for anything but a whole answer."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_SECONDS):
            return await _ask(url, request.encode())
    except (OSError, TimeoutError) as error:
        raise ProbeError(f"{url}: {error or 'no answer in time'}") from error


async def probe_regularly(
    url: str, body: Body, *, interval_seconds: float, most_at_once: int, duration_seconds: float
) -> list[Answer | ProbeError]:
    """Asks at this interval, but only while fewer answers than that are waited for.

    Returns when all are in.
    """
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    async with asyncio.TaskGroup() as asking:
        asked: list[asyncio.Task[Answer | ProbeError]] = []
        while loop.time() - began_at < duration_seconds:
            if sum(not task.done() for task in asked) < most_at_once:
                request = body.text(f"probe-{len(asked)}")
                asked.append(asking.create_task(_answer_or_error(url, request)))
            await asyncio.sleep(interval_seconds)
    return [task.result() for task in asked]


async def probe_in_turn(
    url: str, body: Body, *, duration_seconds: float
) -> list[Answer | ProbeError]:
    """Asks again after each answer, as a single client does."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    answers: list[Answer | ProbeError] = []
    while loop.time() - began_at < duration_seconds:
        answers.append(await _answer_or_error(url, body.text(f"alone-{len(answers)}")))
    return answers


async def _answer_or_error(url: str, request: str) -> Answer | ProbeError:
    """Under load an error is a finding like any other."""
    try:
        return await ask(url, request)
    except ProbeError as error:
        return error


async def _ask(url: str, request: bytes) -> Answer:
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(request)}\r\n\r\n"
        sent_at = loop.time()
        writer.write(head.encode() + request)
        received = bytearray()
        first_at = last_at = 0.0
        searched = events = 0
        while data := await reader.read(_READ_BYTES):
            now = loop.time()
            received += data
            for match in _TEXT.finditer(received, searched):
                first_at = first_at or now
                last_at = now
                searched = match.end()
                events += 1
        total_seconds = loop.time() - sent_at
    finally:
        writer.close()
    if not received.startswith(b"HTTP/1.1 200") or not events:
        raise ProbeError(f"{url}: {bytes(received[:500])!r}")
    return Answer(
        first_text_seconds=first_at - sent_at,
        last_text_seconds=last_at - sent_at,
        total_seconds=total_seconds,
        ended_at=time.time(),
        text_events=events,
        body=bytes(received),
    )
