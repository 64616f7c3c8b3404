"""Answers, streamed and whole, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from libs.common.errors import InvalidRequest
from libs.common.hashing import sequence_hashes
from services.frontend.pipeline import new_request_id
from tests.fixtures.eventually import until
from tests.services.frontend import byte_model
from tests.services.frontend.byte_model import BLOCK_TOKENS, NAME, card, tokens
from tests.services.frontend.fake_router import LENGTH, STOP, Call, fake_router, never_answers, says
from tests.services.frontend.frontends import WORKER_ID, frontend

TEXT = "Grüße 🎉, world"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as streams do."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_an_id_does_not_follow_from_others() -> None:
    drawn = []
    for _ in range(2):
        random.seed(1)
        drawn.append(new_request_id("resp"))
    assert drawn[0] != drawn[1]


async def test_a_whole_chat_answer_has_text_usage_and_headers(tmp_path: Path) -> None:
    async with fake_router(says(TEXT)) as router, frontend(tmp_path, [router]) as started:
        response = await started.chat(max_tokens=100)
        body = response.json()
        assert body["object"] == "chat.completion"
        assert body["model"] == NAME
        [choice] = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
        assert choice["finish_reason"] == "stop"
        prompt = router.calls[0].generation.token_ids
        assert body["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(TEXT.encode()) + 1,
            "total_tokens": len(prompt) + len(TEXT.encode()) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert response.headers["x-switchgear-decode-worker"] == "decode-0"
        assert "x-switchgear-prefill-worker" not in response.headers


async def test_a_chat_stream_has_whole_characters_and_ends_with_usage(tmp_path: Path) -> None:
    async with fake_router(says(TEXT)) as router, frontend(tmp_path, [router]) as started:
        response = await started.chat(stream=True, stream_options={"include_usage": True})
        first, *middle, last, usage = events_of(response)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        texts = [event["choices"][0]["delta"]["content"] for event in middle]
        assert "".join(texts) == TEXT
        assert all("\N{REPLACEMENT CHARACTER}" not in text for text in texts)
        assert last["choices"] == [
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        ]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
        assert all(event["usage"] is None for event in (first, *middle, last))
        assert len({event["id"] for event in (first, *middle, last, usage)}) == 1


async def test_a_completion_stream_has_no_usage_unless_asked(tmp_path: Path) -> None:
    async with fake_router(says(TEXT)) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(stream=True, max_tokens=7)
        *middle, last = events_of(response)
        assert "".join(event["choices"][0]["text"] for event in middle) == "Grüße"
        assert last["choices"][0]["finish_reason"] == "length"
        assert all("usage" not in event for event in (*middle, last))


async def test_several_prompts_give_one_choice_each(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send([call.generation.token_ids[0]], LENGTH, starts=True, cached=1)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(prompt=["abc", "xy"])
        body = response.json()
        assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "x")]
        assert body["usage"]["prompt_tokens"] == 5
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        assert len({call.generation.request_id for call in router.calls}) == 2


async def test_the_router_gets_everything_it_and_the_worker_need(tmp_path: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        prompt = tokens("0123456789")
        response = await started.client.post(
            "/v1/completions",
            headers={"traceparent": trace, "x-request-id": "mine-1"},
            json={
                "model": NAME,
                "prompt": prompt,
                "max_tokens": 9,
                "min_tokens": 2,
                "temperature": 0.5,
                "top_p": 0.25,
                "top_k": -1,
                "min_p": 0.125,
                "seed": 7,
                "presence_penalty": 1.5,
                "frequency_penalty": -1.5,
                "repetition_penalty": 1.25,
                "ignore_eos": True,
                "stop_token_ids": [3],
            },
        )
        assert response.headers["x-request-id"] == "mine-1"
        generation, routing = router.calls[0].generation, router.calls[0].submit.routing
        assert list(generation.token_ids) == prompt
        assert generation.model == routing.model == NAME
        assert generation.request_id == routing.request_id == response.json()["id"]
        assert generation.traceparent == trace
        sampling = {field.name: value for field, value in generation.sampling.ListFields()}
        assert sampling == {
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 0,
            "min_p": 0.125,
            "seed": 7,
            "presence_penalty": 1.5,
            "frequency_penalty": -1.5,
            "repetition_penalty": 1.25,
        }
        assert generation.stopping.max_tokens == 9
        assert generation.stopping.min_tokens == 2
        assert generation.stopping.ignore_eos
        assert list(generation.stopping.stop_token_ids) == [3]
        assert routing.prompt_tokens == 10
        assert routing.block_size_tokens == BLOCK_TOKENS
        assert list(routing.sequence_hashes) == sequence_hashes(prompt, BLOCK_TOKENS)
        assert 590 < routing.timeout.seconds < 600


async def test_a_chat_without_a_limit_may_fill_the_context(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        await started.chat(
            messages=[
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                }
            ]
        )
        generation = router.calls[0].generation
        assert list(generation.token_ids) == tokens(
            "<|bos|><|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )
        limit = byte_model.CONTEXT_TOKENS - len(generation.token_ids)
        assert generation.stopping.max_tokens == limit
        assert not generation.sampling.ListFields()


@pytest.mark.parametrize(
    ("transferred", "headers", "cached"),
    [(8, {"x-switchgear-prefill-worker": "prefill-0"}, 6), (0, {}, 3)],
)
async def test_who_computed_the_prompt_is_told_by_what_was_really_transferred(
    tmp_path: Path, transferred: int, headers: dict[str, str], cached: int
) -> None:
    async def behave(call: Call) -> None:
        call.route("decode-1", "prefill-0", prefill_cached=6)
        call.send(tokens("a"), STOP, starts=True, cached=3, transferred=transferred)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        for stream in (False, True):
            response = await started.chat(
                stream=stream, stream_options=({"include_usage": True} if stream else None)
            )
            found = {k: v for k, v in response.headers.items() if k.startswith("x-switchgear")}
            assert found == {"x-switchgear-decode-worker": "decode-1"} | headers
            assert f'"cached_tokens":{cached}' in response.text
        assert started.metric("cached_tokens_total", model=NAME) == 2 * cached


@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_and_the_work(
    tmp_path: Path, tokens_per_step: int, stream: bool
) -> None:
    behaviour = says("one, two, three" + "." * 500, tokens_per_step=tokens_per_step)
    async with fake_router(behaviour) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(
            stop=["two, t", "zzz"],
            max_tokens=600,
            stream=stream,
            stream_options={"include_usage": True} if stream else None,
        )
        if stream:
            *middle, last, usage = events_of(response)
            text = "".join(event["choices"][0]["text"] for event in middle)
            body = last | {"usage": usage["usage"]}
        else:
            body = response.json()
            text = body["choices"][0]["text"]
        assert text == "one, "
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len("one, two, t")
        if tokens_per_step < 100:
            await until(lambda: router.cancelled_handles)


async def test_text_that_only_looked_like_a_stop_string_comes_out_at_the_end(
    tmp_path: Path,
) -> None:
    async with fake_router(says("one tw")) as router, frontend(tmp_path, [router]) as started:
        assert (await started.complete(stop="two")).json()["choices"][0]["text"] == "one tw"


async def test_stop_strings_wait_for_the_least_tokens(tmp_path: Path) -> None:
    async with fake_router(says("a.b.c")) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(stop=".", min_tokens=3)).json()
        assert body["choices"][0]["text"] == "a.b"


async def test_a_stop_token_has_no_text(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send(tokens("ab!"), STOP, starts=True)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(stop_token_ids=tokens("!"))).json()
        assert body["choices"][0]["text"] == "ab"
        assert body["usage"]["completion_tokens"] == 3


async def test_an_insane_request_id_is_replaced(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        response = await started.client.get("/live", headers={"x-request-id": "a b" * 100})
        assert response.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_cancels(
    tmp_path: Path, stream: bool
) -> None:
    async with fake_router(never_answers) as router, frontend(tmp_path, [router]) as started:
        asking = asyncio.create_task(started.chat(stream=stream))
        await until(lambda: router.calls)
        asking.cancel()
        await until(lambda: router.cancelled_handles)
        await until(lambda: started.metric("disconnects_total") == 1)
        assert started.metric("in_flight_requests") == 0
        assert started.metric("requests_total", model=NAME, endpoint="chat", status="499") == 1


async def test_a_client_that_leaves_in_the_middle_cancels(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send(tokens("first"), starts=True)
        await call.cancelled.wait()

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        body = {"model": NAME, "prompt": "Hi", "stream": True}
        async with started.client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                assert "first" in line
                break
        await until(lambda: router.cancelled_handles)
        await until(lambda: started.metric("disconnects_total") == 1)


async def test_a_client_that_does_not_read_costs_tokens_and_not_events(tmp_path: Path) -> None:
    """Its tokens leave together once it reads: one by one they would not fit into its buffer."""
    count = 3_000
    small_buffer = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
    sent = asyncio.Event()

    async def behave(call: Call) -> None:
        for index in range(count):
            call.send(tokens("x"), starts=index == 0)
        call.send([byte_model.END_TOKEN], STOP)
        sent.set()

    long_name = "m" * 250
    spacious = card(WORKER_ID, model=long_name, context_length_tokens=10 * count)
    async with (
        fake_router(behave) as router,
        frontend(tmp_path, [router], cards=[spacious]) as started,
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(socket_options=small_buffer), timeout=30
        ) as client,
    ):
        await started.until_ready()
        body = {"model": long_name, "prompt": "Hi", "stream": True, "max_tokens": 2 * count}
        url = f"{started.url}/v1/completions"
        async with client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            await sent.wait()
            consumed = router.sessions[0].requests
            await until(lambda: consumed[-1].consumed_responses > count - 64)
            text = "".join([part async for part in response.aiter_text()])
        assert text.endswith("data: [DONE]\n\n")
        events = text.split("\n\n")[:-3]
        assert sum(len(json.loads(e[6:])["choices"][0]["text"]) for e in events) == count
        assert len(events) < count


async def test_health_tells_what_is_missing(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        assert (await started.client.get("/health")).json() == {"status": "ok", "models": [NAME]}
        started.pipeline.is_draining = True
        draining = await started.client.get("/health")
        assert draining.status_code == 503
        assert draining.json()["error"]["message"] == "draining"
        refused = await started.chat()
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert refused.headers["x-switchgear-refused"] == "draining"
        assert refused.headers["connection"] == "close"
        assert (await started.client.get("/live")).status_code == 200


async def test_health_names_a_missing_router(tmp_path: Path) -> None:
    async with frontend(tmp_path) as started:
        await until(lambda: started.models.served())
        response = await started.client.get("/health")
        assert response.status_code == 503
        assert "no router" in response.json()["error"]["message"]


async def test_a_request_waits_a_while_for_a_router(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path) as started:
        await until(lambda: started.models.served())
        asking = asyncio.create_task(started.complete())
        await until(lambda: started.metric("in_flight_requests") == 1)
        started.list_instances(router.instance)
        assert (await asking).status_code == 200


async def test_without_any_router_a_request_fails_in_time(tmp_path: Path) -> None:
    async with frontend(tmp_path, patience_seconds=0.05) as started:
        await until(lambda: started.models.served())
        response = await started.complete()
        assert response.status_code == 503
        assert "no router" in response.json()["error"]["message"]


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async with fake_router(says("four")) as router, frontend(tmp_path, [router]) as started:
        await started.complete(prompt="abc")
        await started.chat(model="none")
        text = (await started.client.get("/metrics")).text
        assert (
            f'frontend_requests_total{{endpoint="completions",model="{NAME}",status="200"}} 1.0'
            in text
        )
        assert 'frontend_requests_total{endpoint="chat",model="",status="404"} 1.0' in text
        assert started.metric("prompt_tokens_total", model=NAME) == 3
        assert started.metric("completion_tokens_total", model=NAME) == 5
        assert started.metric("ttft_seconds_count", model=NAME) == 1
        assert started.metric("request_seconds_count", model=NAME) == 1


async def test_the_official_client_is_content(tmp_path: Path) -> None:
    async with (
        fake_router(says(TEXT)) as router,
        frontend(tmp_path, [router], cards=[card(WORKER_ID, aliases=("short",))]) as started,
        openai.AsyncOpenAI(base_url=f"{started.url}/v1", api_key="any", max_retries=0) as client,
    ):
        await started.until_ready()
        assert [model.id for model in (await client.models.list()).data] == [NAME, "short"]
        assert (await client.models.retrieve("short")).created == 1_700_000_000
        messages: Any = [{"role": "user", "content": "Hi"}]
        whole = await client.chat.completions.create(model="short", messages=messages, stop=["!"])
        assert whole.choices[0].message.content == TEXT
        assert whole.model == NAME
        stream = await client.chat.completions.create(
            model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == TEXT
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens_details is not None
        completion = await client.completions.create(model=NAME, prompt=[5, 6], max_tokens=4)
        assert completion.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.chat.completions.create(model="gpt-7", messages=messages)
        assert not_found.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=NAME, messages=messages, temperature=9)
        assert bad.value.param == "temperature"
        async with client.chat.completions.stream(model=NAME, messages=messages) as helper:
            assert (await helper.get_final_completion()).choices[0].message.content == TEXT


async def test_the_official_client_raises_the_error_within_a_stream(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send(tokens("a"), starts=True)
        call.fail(InvalidRequest("changed my mind"))

    async with (
        fake_router(behave) as router,
        frontend(tmp_path, [router]) as started,
        openai.AsyncOpenAI(base_url=f"{started.url}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = await client.completions.create(model=NAME, prompt="Hi", stream=True)
        with pytest.raises(openai.APIError, match="changed my mind"):
            async for _ in stream:
                pass
