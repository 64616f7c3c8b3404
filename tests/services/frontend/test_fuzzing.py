"""Whatever comes in, a clear answer goes out, and nothing stays behind.

The requests are made from the page that describes the API, so this also holds the page to the
truth: its schemas, statuses and content types are checked against real answers.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from services.frontend.anthropic import errors as anthropic_errors
from services.frontend.openai.page import openapi_page
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import new_nats
from tests.services.frontend.byte_model import NAME, card
from tests.services.frontend.fake_router import Call, embeds, fake_router, says
from tests.services.frontend.frontends import WORKER_ID, Frontend, frontend

START_SECONDS = 60

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@asynccontextmanager
async def jetstream(folder: Path) -> AsyncIterator[str]:
    """A NATS server that keeps streams; yields its URL."""
    server = new_nats(folder, has_jetstream=True)
    await asyncio.to_thread(server.start)
    try:
        yield server.url
    finally:
        server.stop()


VECTORS = "vectors"
"""A model that embeds."""
CARDS = [card(WORKER_ID), card(WORKER_ID, model=VECTORS, embeds=True)]


async def _behave(call: Call) -> None:
    behave = embeds() if call.generation.HasField("pooling") else says("ok", tokens_per_step=9)
    await behave(call)


class Served:
    """A frontend on an event loop in a thread of its own, so that examples may simply block."""

    def __init__(self, folder: Path) -> None:
        self._ready: Future[Frontend] = Future()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(folder)))
        self._thread.start()
        self.frontend = self._ready.result(START_SECONDS)
        self.client = httpx.Client(base_url=self.frontend.url, timeout=30)

    async def _serve(self, folder: Path) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with (
                fake_router(_behave) as router,
                jetstream(folder) as nats_url,
                frontend(
                    folder,
                    [router],
                    cards=CARDS,
                    max_body_bytes=50_000,
                    response_store="nats",
                    nats_url=nats_url,
                ) as started,
            ):

                async def keeps_responses() -> bool:
                    return (await started.client.get("/v1/responses/any")).status_code == 404

                await eventually(keeps_responses)
                await until(lambda: len(started.models.served()) == len(CARDS))
                await started.until_ready()
                self._ready.set_result(started)
                await self._stop.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise

    def close(self) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive()

    def check_healthy(self) -> None:
        """It still serves, and keeps nothing of what came before."""
        answer = self.client.post("/v1/completions", json={"model": NAME, "prompt": "a"})
        assert answer.status_code == 200, answer.text
        assert self.frontend.metric("in_flight_requests") == 0
        assert self.frontend.sessions.in_flight == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("cache"))
    try:
        yield running
        running.check_healthy()
    finally:
        running.close()


def check_answer(response: httpx.Response) -> None:
    """An answer, or an error of the client's in OpenAI's shape."""
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    body = response.json()
    if response.url.path in anthropic_errors.PATHS:
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"message", "type"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in response.text


PAGE: Any = schemathesis.openapi.from_dict(openapi_page(keeps_responses=True))
OPERATIONS = {result.ok().label: result.ok() for result in PAGE.get_all_operations()}
EMBEDDING = ("POST /v1/embeddings", "POST /pooling")
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        # What has no body has nothing to get wrong.
        for mode in ([POSITIVE, NEGATIVE] if label.startswith("POST") else [POSITIVE])
    ],
)
def test_requests_made_from_the_page_get_the_answers_that_it_describes(
    served: Served, label: str, mode: schemathesis.GenerationMode
) -> None:
    operation = OPERATIONS[label]

    @EXAMPLES
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Any, is_for_us: bool) -> None:
        if is_for_us and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = VECTORS if label in EMBEDDING else NAME
        response = case.call(base_url=served.frontend.url, timeout=30)
        case.validate_response(
            response,
            checks=[
                not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    ask()
    served.check_healthy()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(
    {
        field
        for schema in openapi_page(keeps_responses=True)["components"]["schemas"].values()
        for field in schema.get("properties", {})
    }
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6).flatmap(
    lambda fields: st.sampled_from(
        [
            fields,
            {"model": NAME, "prompt": "a", **fields},
            {"model": NAME, **fields},
            {"model": VECTORS, "input": "a", "task": "embed", **fields},
            {"model": VECTORS, "input": "a", **fields},
        ]
    )
)
POSTS = st.sampled_from(
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/pooling",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ]
)


@EXAMPLES
@given(path=POSTS, fields=BODIES)
def test_any_value_in_any_field(served: Served, path: str, fields: dict[str, Any]) -> None:
    # Python's JSON has NaN, Infinity and lone surrogates, which must be refused.
    content = json.dumps(fields).encode()
    headers = {"content-type": "application/json"}
    check_answer(served.client.post(path, content=content, headers=headers))


@EXAMPLES
@given(path=POSTS, body=st.binary(max_size=300), content_type=st.binary(max_size=40))
def test_any_bytes_as_a_body(served: Served, path: str, body: bytes, content_type: bytes) -> None:
    printable = bytes(byte for byte in content_type if 32 < byte < 127)
    for headers in ({b"content-type": b"application/json"}, {b"content-type": printable}):
        check_answer(served.client.post(path, content=body, headers=headers))


@EXAMPLES
@given(
    path=POSTS,
    body=JSON.map(lambda value: json.dumps({"model": NAME, "prompt": "a", "user": value}).encode()),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=3),
)
def test_damaged_bodies(
    served: Served, path: str, body: bytes, cut: int, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(body[: cut or None])
    for place, byte in flips:
        if place < len(damaged):
            damaged[place] = byte
    headers = {"content-type": "application/json"}
    check_answer(served.client.post(path, content=bytes(damaged), headers=headers))


@EXAMPLES
@given(
    size=st.sampled_from([49_000, 49_999, 50_000, 50_001, 200_000]), filler=st.sampled_from("a[")
)
def test_sizes_around_the_limit(served: Served, size: int, filler: str) -> None:
    content = (filler * size).encode()
    headers = {"content-type": "application/json"}
    response = served.client.post("/v1/completions", content=content, headers=headers)
    check_answer(response)
    assert response.status_code == (413 if size > 50_000 else 400)


HEADER_NAMES = st.sampled_from(
    ["x-request-id", "traceparent", "authorization", "accept", "host", "cookie", "x", "expect"]
)
HEADER_VALUES = st.binary(max_size=60).map(
    lambda value: bytes(byte for byte in value if byte > 32 and byte != 127)
)


@EXAMPLES
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PURGE"]),
    path=st.text(max_size=40) | st.sampled_from(FIELDS),
    prefix=st.sampled_from(["/", "/v1/", "/v1/models/", "/v1/chat/completions", "/%ff%00", "//"]),
    headers=st.dictionaries(HEADER_NAMES, HEADER_VALUES, max_size=4),
)
def test_any_method_path_and_headers(
    served: Served, method: str, path: str, prefix: str, headers: dict[str, bytes]
) -> None:
    encoded = path.encode("utf-8", "surrogatepass")
    quoted = "".join(f"%{byte:02x}" for byte in encoded)
    sent = {name.encode(): value for name, value in headers.items()}
    response = served.client.request(method, prefix + quoted, headers=sent)
    if method == "HEAD":
        assert response.status_code < 500
    else:
        check_answer(response)
    assert response.headers["x-request-id"]


@EXAMPLES
@given(
    text=st.text(max_size=200),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=4),
    stream=st.booleans(),
)
def test_any_text_is_a_prompt(served: Served, text: str, stop: list[str], stream: bool) -> None:
    body = {"model": NAME, "prompt": text, "stop": stop, "stream": stream}
    response = served.client.post("/v1/completions", json=body)
    assert response.status_code == (200 if text else 400), response.text
    tokens = served.client.post("/tokenize", json={"model": NAME, "prompt": text}).json()["tokens"]
    back = served.client.post("/detokenize", json={"model": NAME, "tokens": tokens}).json()
    assert back == {"prompt": text}
