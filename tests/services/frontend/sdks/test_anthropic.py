"""Anthropic's SDK for Python."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from tests.services.frontend.sdks.scripted import (
    KEY,
    PLAIN,
    PLAIN_KEY,
    POOR_KEY,
    TALENTED,
    Served,
)

TOOL: Any = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"


def client(served: Served, *, key: str | None = None, **options: Any) -> anthropic.Anthropic:
    url = served.keyed_url if key else served.url
    return anthropic.Anthropic(
        base_url=url, api_key=key or "none", max_retries=options.pop("retries", 0), **options
    )


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def ask(served: Served, text: str, **fields: Any) -> anthropic.types.Message:
    given: Any = {"model": PLAIN, "max_tokens": 500, "messages": [user(text)]} | fields
    with client(served) as connected:
        message = connected.messages.create(**given)
        assert isinstance(message, anthropic.types.Message)
        return message


def texts(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message(served: Served) -> None:
    message = ask(served, "Say: Hello")
    assert (message.type, message.role, message.model) == ("message", "assistant", PLAIN)
    assert texts(message) == "Hello"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.cache_read_input_tokens == 4
    assert message.usage.input_tokens + 4 == 30
    assert message.usage.output_tokens == 6


def test_a_message_that_is_cut(served: Served) -> None:
    message = ask(served, "Say: Hello", max_tokens=2)
    assert (texts(message), message.stop_reason) == ("He", "max_tokens")


def test_the_stop_sequence_that_ended_it(served: Served) -> None:
    message = ask(served, "Say: one two three", stop_sequences=["zz", " th"])
    assert texts(message) == "one two"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " th")


def test_sampling_and_who_asks(served: Served) -> None:
    sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.25}
    message = ask(served, "Sampling:", extra_body=sampling, metadata={"user_id": "u"})
    assert texts(message) == '{"temperature": 0.5, "topP": 0.25, "topK": 9}'


def test_a_system_prompt_in_both_forms(served: Served) -> None:
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be brief.", blocks):
        assert "system\nBe brief.\nuser" in texts(ask(served, "Prompt:", system=system))
    messages = [user("Hi"), {"role": "system", "content": "Be kind."}, user("Prompt:")]
    assert "system\nBe kind.\nuser" in texts(ask(served, "", messages=messages))


def test_output_of_a_schema(served: Served) -> None:
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object", "required": ["a"]}}}
    assert '"required":["a"]' in texts(ask(served, "Constraint:", output_config=wanted))


def test_thinking_and_calls(served: Served) -> None:
    message = ask(
        served,
        f"Say: {THOUGHT}I look.\n{CALL}",
        model=TALENTED,
        tools=[TOOL],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    thinking, text, call = message.content
    assert thinking.type == "thinking"
    assert text.type == "text"
    assert call.type == "tool_use"
    assert (thinking.thinking, text.text) == ("Hm.", "I look.")
    assert (call.name, call.input) == ("get_weather", {"city": "Oslo"})
    assert message.stop_reason == "tool_use"


def test_forced_calls(served: Served) -> None:
    for choice, said in (
        ({"type": "tool", "name": "get_weather"}, '{"city": "Oslo"}'),
        ({"type": "any"}, '[{"name": "get_weather", "parameters": {"city": "Oslo"}}]'),
    ):
        message = ask(served, f"Say: {said}", model=TALENTED, tools=[TOOL], tool_choice=choice)
        [call] = message.content
        assert call.type == "tool_use"
        assert call.input == {"city": "Oslo"}


def test_a_conversation_goes_on(served: Served) -> None:
    first = ask(served, f"Say: {THOUGHT}{CALL}", model=TALENTED, tools=[TOOL])
    [call] = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "4 C"}
    messages: list[Any] = [
        user("How is it in Oslo?"),
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Prompt:"}]},
    ]
    prompt = texts(ask(served, "", model=TALENTED, messages=messages))
    assert "get_weather city=Oslo" in prompt
    assert "tool\nget_weather: 4 C" in prompt


def test_the_events_of_a_stream(served: Served) -> None:
    with client(served) as connected:
        events = [
            *connected.messages.create(
                model=TALENTED,
                max_tokens=500,
                messages=[user(f"Say: {THOUGHT}I look.\n{CALL}")],
                tools=[TOOL],
                stream=True,
            )
        ]
    kinds = [getattr(getattr(event, "delta", None), "type", None) or event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if kinds[at - 1 : at] != [kind]] == [
        "message_start",
        *("content_block_start", "thinking_delta", "content_block_stop"),
        *("content_block_start", "text_delta", "content_block_stop"),
        *("content_block_start", "input_json_delta", "content_block_stop"),
        "message_delta",
        "message_stop",
    ]
    assert events[0].type == "message_start"
    assert events[0].message.usage.input_tokens > 0


async def test_a_stream_put_together(served: Served) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=served.url, api_key="none") as connected,
        connected.messages.stream(
            model=TALENTED,
            max_tokens=500,
            messages=[user(f"Say: {THOUGHT}I look.\n{CALL}")],
            tools=[TOOL],
        ) as stream,
    ):
        assert "".join([text async for text in stream.text_stream]) == "I look."
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.stop_reason == "tool_use"


def test_a_stream_that_the_client_leaves(served: Served) -> None:
    with (
        client(served) as connected,
        connected.messages.stream(
            model=PLAIN, max_tokens=1000, messages=[user("Forever:")]
        ) as stream,
    ):
        assert next(iter(stream.text_stream)).startswith("on")


def test_tokens_are_counted_as_they_are_used(served: Served) -> None:
    prompt: Any = {"model": TALENTED, "messages": [user("Say: Hi")], "tools": [TOOL]}
    with client(served) as connected:
        counted = connected.messages.count_tokens(**prompt).input_tokens
    usage = ask(served, "", **prompt).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra_body": {"temperature": 2.0}}, "temperature"),
        ({"max_tokens": 5000}, "maximum context length"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": [user("Hi"), {"role": "assistant", "content": "Yo"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"extra_body": {"tempreature": 1}}, "tempreature"),
    ],
)
def test_bad_requests(served: Served, fields: Any, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(served, "Hi", **fields)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert message in body["error"]["message"]
    assert body["request_id"] == caught.value.response.headers["x-request-id"]


def test_other_errors(served: Served) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        ask(served, "Hi", model="nobody")
    with pytest.raises(anthropic.RateLimitError, match="rate_limit_error"):
        ask(served, "Busy 9: c")
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        ask(served, "Down 9: c")
    with (
        client(served) as connected,
        pytest.raises(anthropic.APIStatusError, match="timeout_error"),
        connected.messages.stream(
            model=PLAIN, max_tokens=9, messages=[user("Fail: Hello")]
        ) as stream,
    ):
        stream.until_done()


def test_keys(served: Served) -> None:
    hello: Any = {"model": TALENTED, "max_tokens": 9, "messages": [user("Say: Hi")]}
    with client(served, key=KEY) as connected:
        assert texts(connected.messages.create(**hello)) == "Hi"
    for key, error in (
        ("sk-wrong", "authentication_error"),
        (PLAIN_KEY, "permission_error"),
        (POOR_KEY, "rate_limit_error"),
    ):
        with (
            client(served, key=key) as connected,
            pytest.raises(anthropic.APIStatusError, match=error),
        ):
            connected.messages.create(**hello)


def test_full_queues_at_first(served: Served) -> None:
    with client(served, retries=2) as connected:
        message = connected.messages.create(
            model=PLAIN, max_tokens=99, messages=[user("Busy 1: anthropic")]
        )
    assert texts(message) == "attempt 2"


def test_what_is_no_json_is_refused_in_the_same_shape(served: Served) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/messages", content=b"{", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = httpx.get(f"{served.url}/v1/messages")
    assert answer.status_code == 405
    assert answer.json()["type"] == "error"
