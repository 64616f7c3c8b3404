"""What clients hear when they, or we, are wrong: OpenAI's shape, always."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from libs.common.errors import InternalError, NoLiveInstance, Overloaded, SwitchgearError
from switchgear.discovery.v1.discovery_pb2 import ROLE_PREFILL_WORKER
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import CONTEXT_TOKENS, NAME, card
from tests.services.frontend.fake_router import Call, fake_router, never_answers, says
from tests.services.frontend.frontends import WORKER_ID, Frontend, frontend

USER = {"role": "user", "content": "Hi"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Frontend]:
    folder = tmp_path_factory.mktemp("cache")
    async with (
        fake_router(says("Hello")) as router,
        frontend(folder, [router], max_body_bytes=10_000, max_prompts=3, max_choices=6) as started,
    ):
        yield started


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must be nothing else."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "critic", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [USER | {"mood": "x"}]}, "messages[0].mood", "unknown_parameter"),
        (
            {"messages": [USER, USER | {"tool_calls": [{}]}]},
            "messages[1].tool_calls[0].id",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"tempreature": 1}, "tempreature", "unknown_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 7}, "n", "invalid_value"),
        ({"n": 200}, "n", "invalid_value"),
        ({"best_of": 1}, "best_of", "unknown_parameter"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"70000": 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [70_000]}, "stop_token_ids", "invalid_value"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"service_tier": "flex"}, "service_tier", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        ({"user": 5}, "user", "invalid_value"),
        ({"priority": 2**40}, "priority", "invalid_value"),
        ({"cache_salt": 1}, "cache_salt", "invalid_value"),
        ({"bad_words": ["x"]}, "bad_words", "unknown_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"guided_json": "{"}, "guided_json", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "invalid_value",
        ),
        (
            {"structured_outputs": {"structural_tag": "a"}},
            "structured_outputs.structural_tag",
            "unknown_parameter",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "invalid_value",
        ),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [USER | {"reasoning": "x"}]}, "messages[0].reasoning", "invalid_value"),
        ({"messages": [USER | {"tool_call_id": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "missing_required_parameter",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [TOOL]}, "tools", "invalid_value"),
        ({"tools": [TOOL] * 129}, "tools", "invalid_value"),
        ({"tool_choice": "often"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"reasoning_effort": "low"}, "reasoning_effort", "invalid_value"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages",
            "invalid_value",
        ),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"max_tokens": CONTEXT_TOKENS}, "max_tokens", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "x" * CONTEXT_TOKENS}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
async def test_a_bad_chat_request_is_refused_by_name(
    running: Frontend, fields: dict[str, Any], param: str, code: str
) -> None:
    response = await running.chat(**fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [70_000]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": {"text": "Hi"}}, "prompt"),
        ({"prompt": ["a", "b", "c", "d"]}, "prompt"),
        ({"prompt": ["a", "b"], "n": 4}, "n"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
    ],
)
async def test_a_bad_completions_request_is_refused_by_name(
    running: Frontend, fields: dict[str, Any], param: str
) -> None:
    response = await running.complete(**fields)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


async def test_an_image_is_refused_by_its_place(running: Frontend) -> None:
    parts = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]
    response = await running.chat(messages=[USER, {"role": "user", "content": parts}])
    error = error_of(response)
    assert error["param"] == "messages[1].content"
    assert "part 1 is of type 'image_url'" in error["message"]


async def test_neutral_values_of_what_is_not_offered_are_fine(running: Frontend) -> None:
    response = await running.chat(
        n=1,
        logprobs=False,
        top_logprobs=None,
        logit_bias={},
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        store=False,
        user="me",
        metadata={"a": "b"},
        stream_options=None,
        messages=[USER, {"role": "assistant", "content": "a", "refusal": None, "tool_calls": []}],
    )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"", {}, 400, "invalid_json"),
        (b'{"model": "\xff"}', {}, 400, "invalid_json"),
        (b'{"temperature": NaN}', {}, 400, "invalid_json"),
        (b"[]", {}, 400, None),
        (b"x" * 20_000, {}, 413, "request_too_large"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": ""}, 415, "unsupported_media_type"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(
    running: Frontend, content: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await running.client.post(
            path, content=content, headers={"content-type": "application/json"} | headers
        )
        assert response.status_code == status, response.text
        assert error_of(response)["code"] == code


async def test_a_body_of_unknown_length_is_limited_too(running: Frontend) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 1000

    response = await running.client.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/images/generations", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/no/such", 404, "model_not_found"),
    ],
)
async def test_wrong_urls_and_methods_have_a_body_too(
    running: Frontend, method: str, path: str, status: int, code: str
) -> None:
    response = await running.client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("allow" in response.headers) == (status == 405)


async def test_who_asks_for_an_unknown_url_is_told_where_to_look(running: Frontend) -> None:
    error = error_of(await running.client.get("/"))
    assert error["message"].startswith("Unknown request URL: GET / ")
    for path in ("/docs", "/v1/models"):
        assert path in error["message"]
        assert (await running.client.get(path)).status_code == 200


async def test_an_unknown_model_is_not_found(running: Frontend) -> None:
    for stream in (False, True):
        response = await running.chat(model="gpt-7", stream=stream)
        assert response.status_code == 404
        assert error_of(response) == {
            "message": "The model 'gpt-7' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


async def test_a_model_that_is_not_ready_is_unavailable_and_says_why(tmp_path: Path) -> None:
    async with frontend(tmp_path, cards=[card(WORKER_ID, ROLE_PREFILL_WORKER)]) as started:
        response = await started.chat()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        error = error_of(response)
        assert error["type"] == "server_error"
        assert "lacks a decode worker" in error["message"]


async def test_what_is_not_ready_has_one_code_on_every_path(tmp_path: Path) -> None:
    async with frontend(tmp_path, cards=[card(WORKER_ID, ROLE_PREFILL_WORKER)]) as started:
        chat, health = await started.chat(), await started.client.get("/health")
        with pytest.raises(NoLiveInstance) as over_grpc:
            started.models.get(NAME)
        assert {error_of(response)["code"] for response in (chat, health)} == {
            over_grpc.value.reason.lower()
        }
        assert health.headers["retry-after"] == chat.headers["retry-after"]


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (Overloaded("full", retry_after_seconds=2.5), 429, "rate_limit_exceeded", "3"),
        (NoLiveInstance("nobody"), 503, "no_live_instance", "1"),
        (InternalError("secret"), 500, None, None),
    ],
)
async def test_a_failure_before_the_first_token_is_an_http_status(
    tmp_path: Path, failure: SwitchgearError, status: int, code: str | None, retry_after: str | None
) -> None:
    async def behave(call: Call) -> None:
        call.fail(failure)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        for stream in (False, True):
            response = await started.chat(stream=stream)
            assert response.status_code == status
            assert error_of(response)["code"] == code
            assert response.headers.get("retry-after") == retry_after
            assert "secret" not in response.text
        assert started.metric("errors_total", reason=failure.reason) == 2
        assert len(router.calls) == 2


async def test_a_failure_on_our_side_is_found_by_the_id_that_the_client_got(tmp_path: Path) -> None:
    failures: list[SwitchgearError] = [Overloaded("full"), NoLiveInstance("nobody")]

    async def behave(call: Call) -> None:
        call.fail(failures[len(router.calls) - 1])

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        with capture_logs() as logs:
            assert (await started.chat()).status_code == 429  # Nobody's fault but the load's.
            response = await started.chat()
        assert response.status_code == 503
        [entry] = [entry for entry in logs if entry["event"] == "request failed"]
        assert entry["request_id"] == response.headers["x-request-id"]
        assert entry["answer_id"] == router.calls[1].generation.request_id
        assert (entry["status"], entry["reason"]) == (503, "NO_LIVE_INSTANCE")


async def test_a_failure_after_the_first_token_is_the_last_event(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send([1], starts=True)
        call.fail(InternalError("secret"))

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        response = await started.chat(stream=True)
        assert response.status_code == 200
        events = response.text.strip().split("\n\n")
        assert events[-1].startswith('data: {"error":{"message":')
        assert "[DONE]" not in response.text
        assert "secret" not in response.text


async def test_a_bug_is_500_with_its_text_withheld(
    running: Frontend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(name: str) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(running.models, "get", break_down)
    response = await running.chat()
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text
    await until(lambda: "secret" in caplog.text)


async def test_more_requests_than_allowed_are_refused_and_places_come_back(tmp_path: Path) -> None:
    async with (
        fake_router(never_answers) as router,
        frontend(tmp_path, [router], max_concurrent_requests=1) as started,
    ):
        first = asyncio.create_task(started.complete())
        await until(lambda: router.calls)
        refused = await started.complete()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        first.cancel()
        router.behaviour = says("ok")
        await until(lambda: router.cancelled_handles)
        await until(lambda: started.metric("in_flight_requests") == 0)
        assert (await started.complete()).status_code == 200


async def test_a_request_that_takes_too_long_times_out(tmp_path: Path) -> None:
    async with (
        fake_router(never_answers) as router,
        frontend(tmp_path, [router], request_timeout_seconds=0.3) as started,
    ):
        response = await started.chat(stream=True)
        assert response.status_code == 504
        assert error_of(response)["code"] == "timeout"
        sent = router.calls[0].submit.routing.timeout
        assert 0 < sent.nanos < 300_000_000
        await until(lambda: router.cancelled_handles)
