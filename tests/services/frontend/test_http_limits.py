"""What a frontend does with requests that are too large, too slow, too many or not HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import NAME
from tests.services.frontend.fake_router import Call, fake_router, says
from tests.services.frontend.frontends import Frontend, frontend

ANSWER_SECONDS = 20


class Connection:
    """A client's end of a connection, for bytes that no HTTP client would send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, started: Frontend) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", started.http.port))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(ANSWER_SECONDS):
            return await self._reader.read()

    async def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and error of one answer."""
        async with asyncio.timeout(ANSWER_SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
            body = await self._reader.readexactly(int(fields["content-length"]))
        error: dict[str, Any] = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return int(head.split()[1]), error

    @property
    def is_closed(self) -> bool:
        """The server has closed, or cut off."""
        return self._reader.at_eof() or self._reader.exception() is not None

    @property
    def address(self) -> str:
        """The client's host:port."""
        host, port = self._writer.get_extra_info("sockname")
        return f"{host}:{port}"

    def close(self) -> None:
        self._writer.close()


async def refusal(started: Frontend, data: bytes) -> tuple[int, str | None]:
    """What bytes are answered with by a server that then closes."""
    connection = await Connection.to(started)
    try:
        connection.send(data)
        status, error = await connection.answer()
        assert await connection.rest() == b""
        return status, error["code"]
    finally:
        connection.close()


def post(path: str = "/v1/completions", *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\nHELO there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        post("/v1/completions", "content-length: -1"),
        post("/v1/completions", "content-length: 1, 2"),
        post("/v1/completions", "content-length: 99999999999999999999999"),
        post("/v1/completions", "content-length: 5", "transfer-encoding: chunked"),
        post("/v1/completions", "bad header"),
        post("/v1/completions", "x: \x00"),
    ],
)
async def test_what_is_not_http_is_refused_in_the_usual_shape(tmp_path: Path, data: bytes) -> None:
    async with frontend(tmp_path) as started:
        status, code = await refusal(started, data)
        assert (status, code) == (400, "invalid_http")
        assert (await started.client.get("/live")).status_code == 200


async def test_who_speaks_no_http_is_logged_by_address_and_floods_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with frontend(tmp_path) as started:
        first = await Connection.to(started)
        with capture_logs() as logged:
            first.send(b"HELO there\r\n\r\n")
            await first.answer()
            for _ in range(20):
                await refusal(started, b"HELO again\r\n\r\n")
        first.close()
    [line] = [line for line in logged if line["event"] == "request not read"]
    assert (line["peer"], line["code"]) == (first.address, "invalid_http")
    assert not caplog.records


@pytest.mark.parametrize(
    "data",
    [
        post("/v1/completions", "x: " + "a" * 5000),
        post("/" + "a" * 5000),
        post("/v1/completions", *[f"x-{number}: a" for number in range(1000)]),
        # Never complete.
        b"GET / HTTP/1.1\r\nx: " + b"a" * 5000,
        b"GET /" + b"a" * 5000,
    ],
)
async def test_headers_are_limited(tmp_path: Path, data: bytes) -> None:
    async with frontend(tmp_path, max_header_bytes=4096) as started:
        assert await refusal(started, data) == (431, "headers_too_large")


async def test_a_large_body_right_behind_its_headers_is_not_taken_for_headers(
    tmp_path: Path,
) -> None:
    async with frontend(tmp_path, max_header_bytes=2048) as started:
        connection = await Connection.to(started)
        body = b"[" + b" " * 60_000 + b"]"
        connection.send(post("/v1/completions", f"content-length: {len(body)}") + body)
        status, _ = await connection.answer()
        assert status == 400
        connection.close()


async def test_trailers_of_a_body_are_limited_too(tmp_path: Path) -> None:
    async with frontend(tmp_path, max_header_bytes=2048, body_timeout_seconds=20) as started:
        connection = await Connection.to(started)
        connection.send(post("/v1/completions", "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n")
        # In the middle of a request there is no place for an answer of its own.
        async with asyncio.timeout(ANSWER_SECONDS):
            while not connection.is_closed:
                connection.send(b"x: a\r\n" * 100)
                await asyncio.sleep(0)
        connection.close()
        gone = {"endpoint": "completions", "model": "", "status": "499"}
        await until(lambda: started.metric("requests_total", **gone) == 1)


async def test_headers_that_come_too_slowly_time_out(tmp_path: Path) -> None:
    async with frontend(tmp_path, header_timeout_seconds=0.1) as started:
        assert await refusal(started, b"GET / HT") == (408, "request_timeout")


async def test_bodies_that_come_too_slowly_time_out(tmp_path: Path) -> None:
    async with frontend(tmp_path, body_timeout_seconds=0.1) as started:
        data = post("/v1/completions", "content-length: 10") + b"{"
        assert await refusal(started, data) == (408, "request_timeout")
        assert started.metric("in_flight_requests") == 0


async def test_bodies_on_their_way_are_limited_together_and_forgotten(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router], max_buffered_body_bytes=20_000) as started,
    ):
        waiting = await Connection.to(started)
        waiting.send(post("/v1/completions", "content-length: 16000") + b" " * 15_000)

        async def is_full() -> bool:
            response = await started.complete(prompt="x" * 6000)
            if response.status_code == 429:
                assert response.headers["retry-after"] == "1"
                return True
            return False

        async with asyncio.timeout(ANSWER_SECONDS):
            while not await is_full():
                pass
        waiting.close()
        async with asyncio.timeout(ANSWER_SECONDS):
            while await is_full():
                pass
        assert (await started.complete()).status_code == 200


async def test_garbage_behind_a_request_does_not_get_into_its_answer(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.route()
        await call.cancelled.wait()

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        connection = await Connection.to(started)
        body = json.dumps({"model": NAME, "prompt": "a"}).encode()
        connection.send(post("/v1/completions", f"content-length: {len(body)}") + body)
        await until(lambda: router.calls)
        connection.send(b"garbage\r\n\r\n")
        assert await connection.rest() == b""
        connection.close()
        await until(lambda: router.cancelled_handles)


@pytest.mark.parametrize("host", ["[", "a b", "\xff", "x" * 1000, "", "a:99999999"])
async def test_the_host_header_is_not_believed(tmp_path: Path, host: str) -> None:
    async with frontend(tmp_path) as started:
        connection = await Connection.to(started)
        connection.send(f"GET /nothing HTTP/1.1\r\nhost: {host}\r\n\r\n".encode("latin-1"))
        status, error = await connection.answer()
        assert (status, error["code"]) in [(404, "unknown_url"), (400, "invalid_http")]
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 900 + b"]" * 900,
        b'{"model": "m", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 300 + b"}",
        b'{"model": "m", "prompt": "a", "seed": 18446744073709551616}',
        b'{"model": "m", "prompt": "a", "temperature": 1e999}',
        b'{"model": "m", "prompt": "a", "temperature": Infinity}',
        b'{"model": "m", "prompt": "a", "temperature": -NaN}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"model": "m", "prompt": "a"}',
        b'{"model": "m", "prompt": [1e300]}',
        b'{"model": "m", "prompt": [18446744073709551615]}',
        b'{"model": "m", "prompt": "a", "max_tokens": 1e9}',
        b'{"model": "m", "prompt": "a", "logit_bias": {"\\u0000": 1}}',
        b"\x1f\x8b\x08\x00",
        b"nul",
    ],
)
async def test_nasty_bodies_are_bad_requests(tmp_path: Path, body: bytes) -> None:
    async with frontend(tmp_path) as started:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            response = await started.client.post(
                path, content=body, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400, (path, response.text)
            assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_compressed_body_is_refused_by_name(tmp_path: Path) -> None:
    async with frontend(tmp_path) as started:
        response = await started.client.post(
            "/v1/completions",
            content=b"\x1f\x8b",
            headers={"content-type": "application/json", "content-encoding": "gzip"},
        )
        assert response.status_code == 415
        assert "gzip" in response.json()["error"]["message"]
