"""Generation parameters of the REST API: what the workers are told and what clients get."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from libs.common.errors import InvalidRequest, WorkerLost
from libs.common.hashing import sequence_hashes
from switchgear.common.v1 import generation_pb2
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import BLOCK_TOKENS, NAME, tokens
from tests.services.frontend.fake_router import (
    LENGTH,
    Call,
    fake_router,
    made_up_logprobs,
    never_answers,
    says,
)
from tests.services.frontend.frontends import frontend

TEXT = "Grüße 🎉, world"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as streams do."""
    assert response.status_code == 200, response.text
    *events, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or in a chunk, of either endpoint."""
    if "text" in choice:
        return str(choice["text"])
    return (choice.get("message") or choice["delta"]).get("content") or ""


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(text_of(choice) for choice in choices if choice["index"] == index)


def unknown_fields(model: BaseModel, where: str = "") -> list[str]:
    """Fields that OpenAI's own types do not have, at any depth."""
    found = [f"{where}.{name}" for name in model.model_extra or {}]
    for name in type(model).model_fields:
        value = getattr(model, name)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                found += unknown_fields(item, f"{where}.{name}[{index}]")
    return found


async def number_says(call: Call) -> None:
    """Each choice says its own number, in turns."""
    call.route()
    _, _, number = call.generation.request_id.partition("-")[2].partition("-")
    for index, token in enumerate(tokens(f"I am {number or 0}.")):
        call.send([token], starts=index == 0)
    call.send([], LENGTH)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
async def test_n_choices_are_indexed_and_their_prompt_counts_once(
    tmp_path: Path, endpoint: str, stream: bool
) -> None:
    async with fake_router(number_says) as router, frontend(tmp_path, [router]) as started:
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        ask = started.chat if endpoint == "chat" else started.complete
        response = await ask(n=3, max_tokens=50, seed=2**63 - 1, **options)
        if stream:
            *events, last = events_of(response)
            assert [event["choices"] for event in (last,)] == [[]]
            texts = [joined(events, index) for index in range(3)]
            reasons = [
                (choice["index"], choice["finish_reason"])
                for event in events
                for choice in event["choices"]
                if choice["finish_reason"]
            ]
            assert sorted(reasons) == [(index, "length") for index in range(3)]
            usage = last["usage"]
        else:
            body = response.json()
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
            texts = [text_of(choice) for choice in body["choices"]]
            usage = body["usage"]
        assert texts == ["I am 0.", "I am 1.", "I am 2."]
        calls = sorted(router.calls, key=lambda call: call.generation.sampling.seed)
        assert [call.generation.sampling.seed for call in calls] == [0, 1, 2**63 - 1]
        assert usage["prompt_tokens"] == len(calls[0].generation.token_ids)
        assert usage["completion_tokens"] == 3 * len("I am 0.")


async def test_each_choice_of_a_chat_stream_begins_with_its_role(tmp_path: Path) -> None:
    async with fake_router(number_says) as router, frontend(tmp_path, [router]) as started:
        events = events_of(await started.chat(n=2, stream=True))
        for index in range(2):
            own = [c for event in events for c in event["choices"] if c["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert [choice["delta"].get("role") for choice in own[1:]] == [None] * (len(own) - 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_have_n_choices_each(tmp_path: Path, stream: bool) -> None:
    async def behave(call: Call) -> None:
        call.send([call.generation.token_ids[0]], LENGTH, starts=True)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(prompt=["abc", "xy"], n=2, stream=stream)
        if stream:
            texts = [joined(events_of(response), index) for index in range(4)]
        else:
            assert response.json()["usage"]["prompt_tokens"] == 5
            texts = [choice["text"] for choice in response.json()["choices"]]
        assert texts == ["a", "a", "x", "x"]


async def test_a_choice_that_fails_ends_the_whole_answer(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if call.generation.request_id.endswith("-1"):
            call.fail(InvalidRequest("not this one"))
        else:
            await never_answers(call)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        for stream in (False, True):
            response = await started.chat(n=3, stream=stream)
            assert response.status_code == 400
            assert response.json()["error"]["message"] == "not this one"
        await until(lambda: len(router.cancelled_handles) == 4)


async def test_everything_asked_of_the_output_reaches_the_worker(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(
            prompt="0123456789",
            logit_bias={"5": -100, "7": 1.5},
            priority=-2,
            cache_salt="tenant",
            user="me",
            metadata={"a": "b"},
            service_tier="auto",
            best_of=1,
        )
        assert response.json()["service_tier"] == "default"
        generation, routing = router.calls[0].generation, router.calls[0].submit.routing
        assert dict(generation.sampling.logit_bias) == {5: -100.0, 7: 1.5}
        assert generation.priority == -2
        assert generation.kv.cache_salt == "tenant"
        hashes = sequence_hashes(tokens("0123456789"), BLOCK_TOKENS, cache_salt="tenant")
        assert list(routing.sequence_hashes) == hashes
        assert not generation.HasField("logprobs")
        assert not generation.produced_tokens


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("options", "language", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            json.dumps(SCHEMA, separators=(",", ":")),
        ),
        ({"guided_json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json": {}}}, "json_schema", "{}"),
        ({"structured_outputs": {"json_object": True}}, "json_object", True),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"grammar": "root ::= [a]"}}, "grammar", "root ::= [a]"),
        ({"guided_grammar": "root ::= [a]"}, "grammar", "root ::= [a]"),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            "choices",
            generation_pb2.Choices(texts=["a", "b"]),
        ),
        ({"guided_choice": ["a"]}, "choices", generation_pb2.Choices(texts=["a"])),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
async def test_what_an_answer_must_look_like_reaches_the_worker(
    tmp_path: Path, options: dict[str, Any], language: str | None, value: object
) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        assert (await started.chat(**options)).status_code == 200
        constraint = router.calls[0].generation.sampling.constraint
        assert constraint.WhichOneof("language") == language
        assert language is None or getattr(constraint, language) == value


async def test_a_worker_that_can_not_follow_a_constraint_is_quoted_in_the_callers_terms(
    tmp_path: Path,
) -> None:
    async def behave(call: Call) -> None:
        call.fail(InvalidRequest("no structured output here", param="constraint"))

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        for name, value in {
            "response_format": {"type": "json_object"},
            "guided_choice": ["a"],
        }.items():
            response = await started.chat(**{name: value})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("tokens_per_step", [1, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_chat_log_probabilities_are_of_the_tokens_of_the_text(
    tmp_path: Path, stream: bool, tokens_per_step: int
) -> None:
    behaviour = says(TEXT, tokens_per_step=tokens_per_step)
    async with fake_router(behaviour) as router, frontend(tmp_path, [router]) as started:
        response = await started.chat(logprobs=True, top_logprobs=2, stream=stream)
        if stream:
            events = events_of(response)
            assert joined(events) == TEXT
            found = [
                token
                for event in events
                for choice in event["choices"]
                for token in (choice["logprobs"] or {"content": []})["content"]
            ]
        else:
            found = response.json()["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(token["bytes"]) for token in found) == TEXT.encode()
        assert found[0] == {
            "token": "G",
            "logprob": -0.5,
            "bytes": [71],
            "top_logprobs": [
                {"token": "F", "logprob": -0.25, "bytes": [70]},
                {"token": "G", "logprob": -0.5, "bytes": [71]},
            ],
        }
        assert found[2]["token"] == "bytes:\\xc3"


async def test_a_log_probability_of_nothing_is_a_number_still(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.route()
        # What the fake makes up, turned impossible.
        call.send(tokens("a"), LENGTH, starts=True)

    assert made_up_logprobs(5, 1) == [(5, -0.5), (4, -0.25)]
    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        body = (await started.chat(logprobs=True)).json()
        [token] = body["choices"][0]["logprobs"]["content"]
        assert token["top_logprobs"] == []
        assert math.isfinite(token["logprob"])


@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
async def test_tokens_of_a_stop_string_have_no_log_probabilities(
    tmp_path: Path, tokens_per_step: int
) -> None:
    behaviour = says("one, two, three", tokens_per_step=tokens_per_step)
    async with fake_router(behaviour) as router, frontend(tmp_path, [router]) as started:
        for stream in (False, True):
            response = await started.complete(stop="two", logprobs=0, max_tokens=50, stream=stream)
            choices = (
                [choice for event in events_of(response) for choice in event["choices"]]
                if stream
                else response.json()["choices"]
            )
            found = [text for c in choices if c["logprobs"] for text in c["logprobs"]["tokens"]]
            assert "".join(found) == "".join(c["text"] for c in choices) == "one, "


async def test_completions_have_their_own_columns(tmp_path: Path) -> None:
    async with fake_router(says("aé")) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(logprobs=1)).json()
        assert body["choices"][0]["logprobs"] == {
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
            "token_logprobs": [-0.5] * 3,
            "top_logprobs": [
                {"`": -0.25, "a": -0.5},
                {"bytes:\\xc2": -0.25, "bytes:\\xc3": -0.5},
                {"bytes:\\xa8": -0.25, "bytes:\\xa9": -0.5},
            ],
            "text_offset": [0, 1, 1],
        }


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_comes_first_and_has_log_probabilities_of_its_own(
    tmp_path: Path, stream: bool
) -> None:
    async with fake_router(says("cd")) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(prompt="éb", echo=True, logprobs=1, stream=stream)
        choices = (
            [choice for event in events_of(response) for choice in event["choices"]]
            if stream
            else response.json()["choices"]
        )
        assert "".join(choice["text"] for choice in choices) == "ébcd"
        found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        columns = {name: [v for each in found for v in each[name]] for name in found[0]}
        assert columns["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "b", "c", "d"]
        assert columns["text_offset"] == [0, 0, 1, 2, 3]
        assert columns["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
        assert columns["top_logprobs"][0] is None
        call = router.calls[0]
        assert call.generation.logprobs.prompt_alternatives == 1
        # Nobody else can tell, and nothing cached helps.
        assert call.submit.routing.keeps_prompt_local
        assert not call.submit.routing.sequence_hashes


async def test_an_echo_alone_asks_the_workers_for_nothing(tmp_path: Path) -> None:
    async with fake_router(says("cd")) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(prompt=[tokens("ab"), tokens("xy")], echo=True)).json()
        assert [choice["text"] for choice in body["choices"]] == ["abcd", "xycd"]
        assert not router.calls[0].submit.routing.keeps_prompt_local
        assert not router.calls[0].generation.HasField("logprobs")


async def test_log_probabilities_survive_a_lost_worker(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if call.handle == 1:
            call.send(tokens("one S"), starts=True)
            call.fail(WorkerLost("died"), "decode-0")
        else:
            await says("TOP two")(call)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(
            prompt="ab", stop="STOP", max_tokens=50, logprobs=1, echo=True, priority=3
        )
        columns = response.json()["choices"][0]["logprobs"]
        assert "".join(columns["tokens"]) == "abone "
        first, second = (call.generation for call in router.calls)
        assert first.logprobs.HasField("prompt_alternatives")
        # They have come already: the second worker may use what is cached.
        assert not second.logprobs.HasField("prompt_alternatives")
        assert second.logprobs.output_alternatives == 1
        assert not router.calls[1].submit.routing.keeps_prompt_local
        assert (first.produced_tokens, second.produced_tokens) == (0, 5)
        assert second.priority == 3


async def test_a_worker_that_sends_no_log_probabilities_is_not_taken_for_one_that_does(
    tmp_path: Path,
) -> None:
    async def behave(call: Call) -> None:
        call.generation.ClearField("logprobs")
        await says("ok")(call)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        assert (await started.chat(logprobs=True)).status_code == 500
        assert (await started.complete(logprobs=0, echo=True)).status_code == 500


@pytest.mark.parametrize("tokens_per_step", [1, 100])
async def test_the_stop_is_part_of_the_text_when_it_is_to_be(
    tmp_path: Path, tokens_per_step: int
) -> None:
    behaviour = says("one two", tokens_per_step=tokens_per_step)
    async with fake_router(behaviour) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete(stop=" t", include_stop_str_in_output=True)
        assert response.json()["choices"][0]["text"] == "one t"
        ended = await started.complete(include_stop_str_in_output=True, skip_special_tokens=False)
        assert ended.json()["choices"][0]["text"] == "one two<|im_end|>"
        special = await started.complete(skip_special_tokens=False)
        assert special.json()["choices"][0]["text"] == "one two"


async def test_usage_so_far_comes_with_every_chunk(tmp_path: Path) -> None:
    async with fake_router(says("abc")) as router, frontend(tmp_path, [router]) as started:
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = events_of(await started.complete(stream=True, stream_options=options))
        assert [event["usage"]["completion_tokens"] for event in events[:2]] == [1, 2]
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 4


async def test_a_stream_that_is_idle_gets_comments(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await call.cancelled.wait()

    async with (
        fake_router(behave) as router,
        frontend(tmp_path, [router], sse_keep_alive_seconds=0.02) as started,
    ):
        body = {"model": NAME, "prompt": "Hi", "stream": True}
        async with started.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            comments = [await anext(lines) for _ in range(4)]
            assert comments == [": keep-alive", ""] * 2
            await until(lambda: router.calls)
            router.calls[0].send(tokens("a"), starts=True)
            async for line in lines:
                if line.startswith("data: "):
                    assert json.loads(line[6:])["choices"][0]["text"] == "a"
                    break
            router.calls[0].fail(InvalidRequest("changed my mind"))
            rest = [line async for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1][6:])["error"]["message"] == "changed my mind"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True, "top_logprobs": 2, "n": 2, "service_tier": "auto"},
    ],
)
async def test_chat_answers_have_openais_shape(tmp_path: Path, options: dict[str, Any]) -> None:
    async with fake_router(says(TEXT)) as router, frontend(tmp_path, [router]) as started:
        whole = (await started.chat(**options)).text
        parsed = ChatCompletion.model_validate_json(whole, strict=True)
        assert not unknown_fields(parsed)
        streamed = await started.chat(
            stream=True, stream_options={"include_usage": True}, **options
        )
        for event in events_of(streamed):
            chunk = ChatCompletionChunk.model_validate_json(json.dumps(event), strict=True)
            assert not unknown_fields(chunk)


@pytest.mark.parametrize("options", [{}, {"logprobs": 2, "n": 2}])
async def test_completions_have_openais_shape(tmp_path: Path, options: dict[str, Any]) -> None:
    async with fake_router(says(TEXT)) as router, frontend(tmp_path, [router]) as started:
        parsed = Completion.model_validate_json(
            (await started.complete(**options)).text, strict=True
        )
        assert not unknown_fields(parsed)
        streamed = await started.complete(
            stream=True, stream_options={"include_usage": True}, **options
        )
        for event in events_of(streamed):
            for choice in event["choices"]:
                # The type has no null here, which streams have until the last chunk.
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            chunk = Completion.model_validate_json(json.dumps(event), strict=True)
            assert not unknown_fields(chunk)
