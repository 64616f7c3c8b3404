"""/v1/embeddings and /pooling: what is asked, what is answered, and what goes on in between."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from libs.common import tracing
from libs.common.errors import DeadlineExceeded, InvalidRequest, Overloaded, WorkerLost
from libs.common.hashing import sequence_hashes
from switchgear.common.v1 import generation_pb2
from tests.fixtures.eventually import until
from tests.fixtures.spans import KeptSpans
from tests.services.frontend.byte_model import BLOCK_TOKENS, CONTEXT_TOKENS, NAME, card, tokens
from tests.services.frontend.fake_router import (
    STOP,
    Behaviour,
    Call,
    FakeRouter,
    embeds,
    fake_router,
    never_answers,
    says,
    vector,
    worker_id,
)
from tests.services.frontend.frontends import WORKER_ID, Frontend, file_server, frontend
from tests.services.frontend.stored_keys import GOOD, stored, write
from tests.services.frontend.test_access import bearer


@asynccontextmanager
async def embedding(
    folder: Path, behaviour: Behaviour | None = None, **settings: Any
) -> AsyncIterator[tuple[FakeRouter, Frontend]]:
    """A frontend whose one model embeds."""
    async with (
        fake_router(behaviour or embeds()) as router,
        file_server() as (_, worker),
        frontend(
            folder, [router], cards=[card(WORKER_ID, embeds=True)], workers=[worker], **settings
        ) as started,
    ):
        await started.until_ready()
        yield router, started


async def embed(started: Frontend, given: object, **fields: Any) -> httpx.Response:
    return await started.client.post(
        "/v1/embeddings", json={"model": NAME, "input": given} | fields
    )


def numbers(prompt: list[int]) -> list[float]:
    return list(struct.unpack("<8f", vector(prompt)))


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Grüße", ["Grüße"]),
        (["one", "two", "three"], ["one", "two", "three"]),
        (tokens("one"), ["one"]),
        ([tokens("one"), tokens("two")], ["one", "two"]),
    ],
)
async def test_each_input_becomes_a_vector_in_its_place(
    tmp_path: Path, given: object, prompts: list[str]
) -> None:
    async with embedding(tmp_path) as (_, started):
        answer = await embed(started, given, user="me")
        assert answer.status_code == 200, answer.text
        prompt_tokens = sum(len(tokens(prompt)) for prompt in prompts)
        assert answer.json() == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": numbers(tokens(prompt))}
                for index, prompt in enumerate(prompts)
            ],
            "model": NAME,
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        }
        assert answer.headers["x-request-id"]
        labels = {"model": NAME, "endpoint": "embeddings", "status": "200"}
        assert started.metric("requests_total", **labels) == 1
        assert started.metric("prompt_tokens_total", model=NAME) == prompt_tokens
        assert started.metric("request_seconds_count", model=NAME) == 1


async def test_base64_is_the_same_numbers_as_32_bit_floats(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (_, started):
        answer = await embed(started, ["a", "bc"], encoding_format="base64")
        for item, prompt in zip(answer.json()["data"], ("a", "bc"), strict=True):
            assert base64.b64decode(item["embedding"]) == vector(tokens(prompt))


async def test_a_large_answer_comes_in_pieces_and_whole(tmp_path: Path) -> None:
    async with embedding(tmp_path, embeds(4096)) as (_, started):
        inputs = [f"text {index}" for index in range(11)]
        for encoding in ("float", "base64"):
            answer = await embed(started, inputs, encoding_format=encoding)
            assert answer.headers["transfer-encoding"] == "chunked"
            for index, item in enumerate(answer.json()["data"]):
                assert item["index"] == index
                found = item["embedding"]
                if encoding == "float":
                    found = base64.b64encode(struct.pack("<4096f", *found)).decode()
                assert base64.b64decode(found) == vector(tokens(inputs[index]), 4096)
        assert "content-length" in (await embed(started, inputs[:2])).headers


async def test_what_the_router_is_told_of_an_input(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (router, started):
        await embed(started, ["one two", "three"], cache_salt="salt", priority=3)
        first, second = sorted(router.calls, key=lambda call: call.generation.request_id)
        prompt = tokens("one two")
        routing, generation = first.submit.routing, first.generation
        assert list(generation.token_ids) == prompt
        assert generation.pooling.task == generation_pb2.POOLING_TASK_EMBED
        assert not generation.pooling.HasField("dimensions")
        assert generation.priority == 3
        assert routing.prompt_tokens == len(prompt)
        assert routing.keeps_prompt_local
        hashes = sequence_hashes(prompt, BLOCK_TOKENS, cache_salt="salt")
        assert list(routing.sequence_hashes) == hashes
        assert routing.request_id.startswith("embd-")
        assert second.submit.routing.request_id == f"{routing.request_id}-1"


async def test_messages_go_through_the_template_and_are_one_input(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (router, started):
        messages = [{"role": "user", "content": "Hi"}]
        answer = await started.client.post(
            "/v1/embeddings", json={"model": NAME, "messages": messages}
        )
        assert len(answer.json()["data"]) == 1
        expected = tokens("<|bos|><|im_start|>user\nHi<|im_end|>\n")
        assert list(router.calls[0].generation.token_ids) == expected


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input"),
        ({"input": [[1], []]}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": {"a": 1}}, "invalid_value", "input"),
        ({"input": None}, "invalid_value", ""),
        ({"messages": [{"role": "user", "content": "a"}]}, "invalid_value", ""),
        ({"input": [[1, 99999]]}, "invalid_value", "input"),
        ({"input": "x" * (CONTEXT_TOKENS + 1)}, "context_length_exceeded", "input"),
        ({"input": ["a", "x" * (CONTEXT_TOKENS + 1)]}, "context_length_exceeded", "input[1]"),
        ({"dimensions": 0}, "invalid_value", "dimensions"),
        ({"encoding_format": "bytes"}, "invalid_value", "encoding_format"),
        ({"truncate_prompt_tokens": CONTEXT_TOKENS + 1}, "invalid_value", "truncate_prompt_tokens"),
        ({"use_activation": False}, "unsupported_parameter", "use_activation"),
        ({"max_tokens": 1}, "unknown_parameter", "max_tokens"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"model": "x"}, "model_not_found", "model"),
    ],
)
async def test_a_bad_request_is_refused_and_nothing_runs(
    tmp_path: Path, fields: dict[str, Any], code: str, param: str
) -> None:
    async with embedding(tmp_path) as (router, started):
        answer = await embed(started, "Hi", **fields)
        assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert router.calls == []


async def test_longer_inputs_are_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (router, started):
        text = "x" * CONTEXT_TOKENS + "yz"
        asked: list[dict[str, Any]] = [
            {"truncate_prompt_tokens": 2},
            {"truncate_prompt_tokens": 2, "truncation_side": "left"},
            {"truncate_prompt_tokens": -1},
        ]
        for fields in asked:
            for given in (text, tokens(text)):
                assert (await embed(started, given, **fields)).status_code == 200
        found = [list(call.generation.token_ids) for call in router.calls]
        expected = [tokens("xx"), tokens("yz"), tokens("x" * CONTEXT_TOKENS)]
        assert found == [prompt for prompt in expected for _ in range(2)]


async def test_the_whole_context_may_be_embedded(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (_, started):
        assert (await embed(started, "x" * CONTEXT_TOKENS)).status_code == 200


async def test_a_model_that_generates_refuses_embeddings(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        for path, more in (("/v1/embeddings", {}), ("/pooling", {"task": "embed"})):
            body = {"model": NAME, "input": "a"} | more
            answer = await started.client.post(path, json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "unsupported_model"
            assert f"'{NAME}' generates text" in answer.json()["error"]["message"]
        assert router.calls == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}),
    ],
)
async def test_a_model_that_embeds_refuses_to_generate(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    async with embedding(tmp_path) as (router, started):
        answer = await started.client.post(path, json=body | {"model": NAME})
        assert answer.status_code == 400
        assert f"'{NAME}' only supports embeddings" in answer.json()["error"]["message"]
        assert router.calls == []
        listed = (await started.client.get("/v1/models")).json()["data"]
        assert [model["task"] for model in listed] == ["embed"]


async def test_inputs_run_side_by_side_up_to_the_bound(tmp_path: Path) -> None:
    running = most = 0
    go_on = asyncio.Event()

    async def behave(call: Call) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1
        await embeds()(call)

    async with embedding(tmp_path, behave, max_parallel_inputs=3) as (router, started):
        texts = [str(index) for index in range(10)]
        asking = asyncio.create_task(embed(started, texts))
        await until(lambda: running == 3)
        go_on.set()
        answer = await asking
        found = [item["embedding"] for item in answer.json()["data"]]
        assert found == [numbers(tokens(text)) for text in texts]
        assert most == 3
        assert len(router.calls) == 10


async def test_an_input_whose_worker_dies_is_embedded_by_another(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if not call.submit.routing.excluded_instance_ids and call.generation.token_ids[0] % 2:
            call.route("dead")
            call.fail(WorkerLost("dead was lost"), failed="dead")
        else:
            await embeds()(call)

    async with embedding(tmp_path, behave) as (router, started):
        texts = list("abcdef")
        answer = await embed(started, texts)
        assert answer.status_code == 200, answer.text
        found = [item["embedding"] for item in answer.json()["data"]]
        assert found == [numbers(tokens(text)) for text in texts]
        # So that `rate` sees the first one of another reason.
        registry = started.pipeline.metrics.registry
        name = "switchgear_frontend_migrations_total"
        labels = {"model": NAME, "reason": "NO_LIVE_INSTANCE"}
        assert registry.get_sample_value(name, labels) == 0
        excluded = [list(c.submit.routing.excluded_instance_ids) for c in router.calls]
        assert excluded.count([worker_id("dead")]) == 3
        assert started.metric("migrations_total", model=NAME, reason="WORKER_LOST") == 3


async def test_full_queues_are_told_at_once_unless_something_was_spent(tmp_path: Path) -> None:
    refused: set[int] = set()

    async def behave(call: Call) -> None:
        first = call.generation.token_ids[0]
        if first == tokens("r")[0] and first not in refused:
            refused.add(first)
            call.fail(Overloaded("all queues are full", retry_after_seconds=3))
        else:
            await embeds()(call)

    async with embedding(tmp_path, behave, max_parallel_inputs=1) as (router, started):
        told = await embed(started, ["r", "a"])
        assert (told.status_code, told.headers["retry-after"]) == (429, "3")
        assert len(router.calls) == 1
        refused.clear()
        assert (await embed(started, ["a", "r"])).status_code == 200


async def test_one_input_that_fails_ends_the_others(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if call.generation.token_ids[0] == tokens("b")[0]:
            await until(lambda: len(router.calls) == 3)
            error = InvalidRequest("the model's vectors can't be cut short", param="dimensions")
            call.route()
            call.send([], generation_pb2.FINISH_REASON_ERROR, error=error)
        else:
            await never_answers(call)

    async with embedding(tmp_path, behave) as (router, started):
        answer = await embed(started, ["a", "b", "c"], dimensions=5)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "dimensions"
        assert {call.generation.pooling.dimensions for call in router.calls} == {5}
        await until(lambda: len(router.cancelled_handles) == 2)
        assert started.sessions.in_flight == 0


async def test_a_client_that_leaves_cancels_everything(tmp_path: Path) -> None:
    async with embedding(tmp_path, never_answers) as (router, started):
        asking = asyncio.create_task(embed(started, ["a", "b"]))
        await until(lambda: len(router.calls) == 2)
        asking.cancel()
        await until(lambda: len(router.cancelled_handles) == 2)
        await until(lambda: started.metric("in_flight_requests") == 0)
        await until(lambda: started.metric("disconnects_total") == 1)


async def test_the_time_for_a_request_is_limited(tmp_path: Path) -> None:
    async with embedding(tmp_path, never_answers, request_timeout_seconds=0.3) as (router, started):
        answer = await embed(started, ["a", "b"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        await until(lambda: len(router.cancelled_handles) == 2)

    async def late(call: Call) -> None:
        call.fail(DeadlineExceeded("the deadline passed in the router"))

    async with embedding(tmp_path, late) as (_, started):
        assert (await embed(started, "a")).status_code == 504


async def test_a_worker_that_sends_no_vector_is_a_bug(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.route()
        call.send([], STOP, starts=True)

    async with embedding(tmp_path, behave) as (_, started):
        assert (await embed(started, "a")).status_code == 500


async def test_the_inputs_of_a_call_are_one_trace(tmp_path: Path) -> None:
    sink = KeptSpans()
    async with embedding(tmp_path, max_parallel_inputs=1) as (router, started):
        with tracing.giving_to(sink):
            trace_id = "0af7651916cd43dd8448eb211c80319c"
            caller = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
            await started.client.post(
                "/v1/embeddings", json={"model": NAME, "input": ["a", "c"]}, headers=caller
            )
    spans = [(span.name, attributes, error) for span, _, attributes, error in sink.ended]
    requests = [one for one in spans if one[0] == f"embeddings {NAME}"]
    assert [attributes["gen_ai.response.id"] for _, attributes, _ in requests] == [
        call.generation.request_id for call in router.calls
    ]
    assert [(a["gen_ai.usage.input_tokens"], error) for _, a, error in requests] == [(1, "")] * 2
    assert [name for name, _, _ in spans].count("attempt") == 2
    for call in router.calls:
        assert trace_id in call.generation.traceparent
        assert call.submit.routing.traceparent == call.generation.traceparent


async def test_keys_limits_and_allow_lists_hold(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    other = GOOD + "other"
    write(
        keys,
        stored(tokens_per_minute=100),
        stored(other, "other", models=["something else"]),
    )
    async with embedding(tmp_path, api_keys=str(keys)) as (router, started):
        client = started.client
        assert (await embed(started, "a")).status_code == 401
        client.headers.update(bearer(other))
        refused = await embed(started, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_found")
        client.headers.update(bearer(GOOD))
        served = await embed(started, ["x" * 30, "y" * 30])
        assert served.status_code == 200
        assert 40 <= int(served.headers["x-ratelimit-remaining-tokens"]) < 45
        limited = await embed(started, ["x" * 30, "y" * 30])
        assert (limited.status_code, limited.json()["error"]["type"]) == (429, "tokens")
        assert {call.generation.kv.cache_salt for call in router.calls} == {"good/"}


async def test_pooling_answers_in_vllms_shape(tmp_path: Path) -> None:
    async with embedding(tmp_path) as (_, started):
        body = {"model": NAME, "input": ["one", "two"], "task": "embed"}
        answer = (await started.client.post("/pooling", json=body)).json()
        assert answer.pop("id").startswith("pool-")
        assert answer.pop("created") > 1_700_000_000
        assert answer == {
            "object": "list",
            "data": [
                {"index": index, "object": "pooling", "data": numbers(tokens(text))}
                for index, text in enumerate(("one", "two"))
            ],
            "model": NAME,
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        }


@pytest.mark.parametrize("task", [None, "token_embed", "classify", "token_classify", "plugin", 3])
async def test_other_tasks_of_pooling_are_refused_by_name(tmp_path: Path, task: object) -> None:
    async with embedding(tmp_path) as (router, started):
        body = {"model": NAME, "input": "a"} | ({} if task is None else {"task": task})
        answer = await started.client.post("/pooling", json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "task"
        assert ("Missing" if task is None else repr(str(task))) in error["message"]
        assert router.calls == []
