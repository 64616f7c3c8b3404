"""Tools and reasoning over real HTTP: transcripts that a model writes, as clients get them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from services.frontend.tokenizer import ModelTokenizer
from switchgear.common.v1 import generation_pb2
from tests.services.frontend import byte_model, tool_model
from tests.services.frontend.fake_router import LENGTH, STOP, Call, FakeRouter, fake_router
from tests.services.frontend.frontends import WORKER_ID, Frontend, file_server, frontend
from tests.services.frontend.test_openai_answers import events_of

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER: ChatCompletionMessageParam = {"role": "user", "content": "How is it in Paris and Oslo?"}

THOUGHT = "<think>\nThey want weather.\n</think>\n\n"
CALLS = (
    "I look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris 🗼"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo }"}}\n</tool_call>'
)
HARMONY = (
    "<|channel|>analysis<|message|>They want weather.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Paris"}<|call|>'
)
HARMONY_TOKENS = (
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
)  # fmt: skip


@dataclass
class Serving:
    """A frontend with one model, and what its router saw."""

    started: Frontend
    router: FakeRouter
    tokenizer: ModelTokenizer

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.started.url}/v1", api_key="none", max_retries=0)

    @property
    def prompt(self) -> str:
        """Of the last request."""
        token_ids = list(self.router.calls[-1].generation.token_ids)
        return self.tokenizer.detokenizer((), marks=ALL_SPECIAL).add(token_ids)

    async def chat(self, **fields: Any) -> dict[str, Any]:
        """The only choice of an answer."""
        response = await self.started.chat(messages=[USER], tools=[WEATHER], **fields)
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        assert isinstance(choice, dict)
        return choice


ALL_SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>", *HARMONY_TOKENS)


@asynccontextmanager
async def serving(
    folder: Path,
    text: str,
    *,
    files: dict[str, bytes] | None = None,
    tools: str = "",
    reasoning: str = "",
    finish: generation_pb2.FinishReason.ValueType = STOP,
) -> AsyncIterator[Serving]:
    """A model that answers everything with this text, a token in each step."""
    files = tool_model.files() if files is None else files
    tokenizer = ModelTokenizer(files)

    async def behave(call: Call) -> None:
        call.route()
        answer = [*tokenizer.encode(text), byte_model.END_TOKEN]
        for index, token in enumerate(answer):
            is_last = index == len(answer) - 1
            call.send([token], finish if is_last else None, starts=index == 0)

    async with (
        fake_router(behave) as router,
        file_server(files) as (_, worker),
        frontend(
            folder,
            [router],
            cards=[tool_model.card(WORKER_ID, files, tools=tools, reasoning=reasoning)],
            workers=[worker],
        ) as started,
    ):
        await started.until_ready()
        yield Serving(started, router, tokenizer)


def functions(calls: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


async def test_a_whole_answer_has_reasoning_content_and_calls(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + CALLS) as model:
        choice = await model.chat()
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message["reasoning"] == message["reasoning_content"] == "They want weather."
        assert message["content"] == "I look."
        assert functions(message["tool_calls"]) == [
            ("get_weather", {"city": "Paris 🗼"}),
            ("get_weather", {"city": "Oslo }"}),
        ]
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == 2
        assert all(call_id.startswith("call_") for call_id in ids)
        assert {call["type"] for call in message["tool_calls"]} == {"function"}


async def test_a_stream_names_a_call_before_its_arguments_come(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + CALLS) as model:
        response = await model.started.chat(messages=[USER], tools=[WEATHER], stream=True)
        first, *middle, last = [event["choices"][0] for event in events_of(response)]
        assert first["delta"] == {"role": "assistant", "content": None}
        assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
        calls: list[dict[str, Any]] = []
        fragments = 0
        for choice in middle:
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls)
                    assert call["type"] == "function"
                    calls.append(call)
                else:
                    assert set(call) == {"index", "function"}
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
                    fragments += 1
        assert [city["city"] for _, city in functions(calls)] == ["Paris 🗼", "Oslo }"]
        assert fragments >= 2  # How many depends on how many tokens are read at a time.
        reasoning = "".join(choice["delta"].get("reasoning", "") for choice in middle)
        assert reasoning == "They want weather."


async def test_content_is_null_when_there_are_only_calls(tmp_path: Path) -> None:
    async with serving(tmp_path, CALLS.removeprefix("I look.\n")) as model:
        message = (await model.chat())["message"]
        assert message["content"] is None
        assert "reasoning" not in message


async def test_an_answer_that_ran_out_of_tokens_says_so_whatever_it_called(tmp_path: Path) -> None:
    async with serving(tmp_path, CALLS[:80], finish=LENGTH) as model:
        choice = await model.chat()
        assert choice["finish_reason"] == "length"
        [call] = choice["message"]["tool_calls"]
        assert '{"city": "Paris 🗼"}'.startswith(call["function"]["arguments"])


async def test_only_the_first_call_is_given_without_parallel_tool_calls(tmp_path: Path) -> None:
    async with serving(tmp_path, CALLS) as model:
        message = (await model.chat(parallel_tool_calls=False))["message"]
        assert functions(message["tool_calls"]) == [("get_weather", {"city": "Paris 🗼"})]


async def test_tool_choice_none_shows_no_tools_and_reads_no_calls(tmp_path: Path) -> None:
    async with serving(tmp_path, CALLS) as model:
        message = (await model.chat(tool_choice="none"))["message"]
        assert message["content"] == CALLS
        assert "<tools>" not in model.prompt


async def test_reasoning_can_be_left_out(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + "Hi") as model:
        assert (await model.chat(include_reasoning=False))["message"] == {
            "role": "assistant",
            "content": "Hi",
            "refusal": None,
        }


async def test_reasoning_is_read_without_tools_too(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + "Hi") as model:
        [choice] = (await model.started.chat()).json()["choices"]
        assert choice["message"]["reasoning"] == "They want weather."
        assert choice["message"]["content"] == "Hi"
        assert choice["finish_reason"] == "stop"


async def test_a_worker_can_turn_parsers_off(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + "Hi", reasoning="none", tools="none") as model:
        [choice] = (await model.started.chat()).json()["choices"]
        assert choice["message"]["content"] == THOUGHT + "Hi"
        response = await model.started.chat(tools=[WEATHER])
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        assert "--tool-parser" in response.json()["error"]["message"]


async def test_special_tokens_that_mark_calls_are_seen_and_others_are_not(tmp_path: Path) -> None:
    files = tool_model.files(special=HARMONY_TOKENS)
    async with serving(tmp_path, HARMONY, files=files) as model:
        choice = await model.chat()
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message["reasoning"] == "They want weather."
        assert message["content"] is None
        assert functions(message["tool_calls"]) == [("get_weather", {"city": "Paris"})]


async def test_mistrals_ids_are_such_as_its_template_takes(tmp_path: Path) -> None:
    files = tool_model.files(special=("[TOOL_CALLS]", "[ARGS]"))
    text = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
    async with serving(tmp_path, text, files=files) as model:
        [call] = (await model.chat())["message"]["tool_calls"]
        assert len(call["id"]) == 9
        assert call["id"].isalnum()


async def test_a_conversation_with_results_goes_to_the_template(tmp_path: Path) -> None:
    async with serving(tmp_path, "Fine.") as model:
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
        }
        response = await model.started.chat(
            tools=[WEATHER],
            messages=[
                {"role": "developer", "content": "Be short."},
                USER,
                {"role": "assistant", "reasoning": "Hm", "content": None, "tool_calls": [call]},
                {
                    "role": "tool",
                    "tool_call_id": "call_1",
                    "content": [{"type": "text", "text": "4 °C"}],
                },
            ],
        )
        assert response.json()["choices"][0]["message"]["content"] == "Fine."
        assert model.prompt == (
            f"<|bos|><tools>{json.dumps(WEATHER)}</tools>Answer within <tool_call></tool_call>.\n"
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\nHow is it in Paris and Oslo?<|im_end|>\n"
            "<|im_start|>assistant\n<think>Hm</think><tool_call>get_weather city=Oslo</tool_call>"
            "<|im_end|>\n<|im_start|>tool\nget_weather: 4 °C<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    "fields",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}],
)
async def test_thinking_can_be_turned_off(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path, "Hi") as model:
        choice = await model.chat(**fields)
        assert choice["message"]["content"] == "Hi"
        assert model.prompt.endswith("assistant\n<think>\n\n</think>\n\n")


async def test_a_prompt_that_ends_with_the_opening_mark_begins_reasoning(tmp_path: Path) -> None:
    files = tool_model.files(tool_model.TEMPLATE + "<think>\n")
    async with serving(tmp_path, "Hm.\n</think>\n\nHi", files=files) as model:
        message = (await model.chat())["message"]
        assert (message["reasoning"], message["content"]) == ("Hm.", "Hi")


async def test_what_the_template_does_not_know_is_refused(tmp_path: Path) -> None:
    files = byte_model.files()
    async with serving(tmp_path, "Hi", files=files, tools="hermes") as model:
        response = await model.started.chat(tools=[WEATHER])
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        assert "takes no tools" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("required", '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'),
        ({"type": "function", "function": {"name": "get_weather"}}, '{"city": "Paris"}'),
    ],
)
async def test_a_forced_call_constrains_the_output_to_what_is_then_read(
    tmp_path: Path, choice: object, answer: str
) -> None:
    async with serving(tmp_path, answer) as model:
        given = await model.chat(tool_choice=choice)
        [call] = given["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        constraint = model.router.calls[-1].generation.sampling.constraint
        assert jsonschema_rs.is_valid(json.loads(constraint.json_schema), json.loads(answer))
        assert not jsonschema_rs.is_valid(json.loads(constraint.json_schema), "Paris")


async def test_the_openai_client_gets_the_same_calls_whole_and_streamed(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + CALLS) as model, model.client() as client:
        whole = await client.chat.completions.create(
            model=byte_model.NAME, messages=[USER], tools=[WEATHER]
        )
        async with client.chat.completions.stream(
            model=byte_model.NAME, messages=[USER], tools=[WEATHER]
        ) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.done") == 2
        [one], [other] = whole.choices, streamed.choices
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content == other.message.content == "I look."
        assert one.message.tool_calls
        assert other.message.tool_calls
        assert [call.function for call in one.message.tool_calls if call.type == "function"] == [
            openai.types.chat.chat_completion_message_tool_call.Function(
                name=call.function.name, arguments=call.function.arguments
            )
            for call in other.message.tool_calls
        ]


async def test_the_openai_client_can_give_results_back(tmp_path: Path) -> None:
    async with serving(tmp_path, THOUGHT + CALLS) as model, model.client() as client:
        answer = await client.chat.completions.create(
            model=byte_model.NAME, messages=[USER], tools=[WEATHER]
        )
        message = answer.choices[0].message
        assert message.tool_calls
        results: list[ChatCompletionMessageParam] = [
            {"role": "tool", "tool_call_id": call.id, "content": "fine"}
            for call in message.tool_calls
        ]
        given_back: Any = message.model_dump(exclude_none=True)
        await client.chat.completions.create(
            model=byte_model.NAME, messages=[USER, given_back, *results], tools=[WEATHER]
        )
        assert "<think>They want weather.</think>I look.<tool_call>" in model.prompt
        assert model.prompt.count("get_weather: fine") == 2
