"""OpenAI's SDK for Python, sync and async, with all cases."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.services.frontend.sdks.cases import BY_NAME, NAMES, check, for_client, streamed
from tests.services.frontend.sdks.scripted import (
    KEY,
    PLAIN,
    PLAIN_KEY,
    POOR_KEY,
    TALENTED,
    Served,
)

LEFT_AFTER_EVENTS = 4
KEYS = {"good": KEY, "plain": PLAIN_KEY, "poor": POOR_KEY, "wrong": "sk-wrong"}


def options(case: dict[str, Any], served: Served) -> dict[str, Any]:
    """Of the client."""
    url = served.url
    match case.get("key"):
        case "nobody":
            url = "http://127.0.0.1:9"
        case str():
            url = served.keyed_url
    return {
        "base_url": f"{url}/v1",
        "api_key": KEYS.get(case.get("key", ""), "none"),
        "max_retries": case.get("retries", 0),
        "timeout": case.get("timeout_seconds", 20),
    }


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Named ones, of the call."""
    found = dict(case.get("body", {}))
    if "extra_body" in case:
        found["extra_body"] = case["extra_body"]
    if "headers" in case:
        found["extra_headers"] = case["headers"]
    return found


def method(client: Any, case: dict[str, Any]) -> Any:
    *path, last = case["call"].split(".")
    for name in path:
        client = getattr(client, name)
    match case.get("how"):
        case "raw":
            client = client.with_raw_response
        case "final":
            last = "stream"
    return getattr(client, last)


def plain(result: Any) -> Any:
    """As JSON, with what the SDK adds."""
    if hasattr(result, "http_response"):
        body = plain(result.parse())
        return {"status": result.status_code, "headers": dict(result.headers), "body": body}
    found = result.to_dict()
    if isinstance(result, openai.types.responses.Response):
        found["output_text"] = result.output_text
    return found


def failure(error: openai.APIError) -> dict[str, Any]:
    return {
        "error": {
            "class": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "code": error.code,
            "param": error.param,
        }
    }


def outcome(case: dict[str, Any], served: Served) -> dict[str, Any]:
    with openai.OpenAI(**options(case, served)) as client:
        try:
            called = method(client, case)
            if case.get("how") == "final":
                with called(**arguments(case)) as stream:
                    is_chat = case["call"].startswith("chat")
                    last = stream.get_final_completion if is_chat else stream.get_final_response
                    return {"result": plain(last())}
            result = called(*case.get("args", ()), **arguments(case))
            if not isinstance(result, openai.Stream):
                return {"result": plain(result)}
            with result:
                events = []
                for event in result:
                    events.append(event.to_dict())
                    if case.get("how") == "leave" and len(events) > LEFT_AFTER_EVENTS:
                        break
            return {"result": streamed(events)}
        except openai.APIError as error:
            return failure(error)


async def async_outcome(case: dict[str, Any], served: Served) -> dict[str, Any]:
    async with openai.AsyncOpenAI(**options(case, served)) as client:
        try:
            called = method(client, case)
            if case.get("how") == "final":
                async with called(**arguments(case)) as stream:
                    is_chat = case["call"].startswith("chat")
                    last = stream.get_final_completion if is_chat else stream.get_final_response
                    return {"result": plain(await last())}
            if case["call"] == "models.list":
                return {"result": plain(await called())}
            result = await called(*case.get("args", ()), **arguments(case))
            if not isinstance(result, openai.AsyncStream):
                return {"result": plain(result)}
            async with result:
                events = []
                async for event in result:
                    events.append(event.to_dict())
                    if case.get("how") == "leave" and len(events) > LEFT_AFTER_EVENTS:
                        break
            return {"result": streamed(events)}
        except openai.APIError as error:
            return failure(error)


@pytest.mark.parametrize("name", NAMES)
def test_sync(served: Served, name: str) -> None:
    case = for_client(BY_NAME[name], "sync")
    check(case, outcome(case, served), {})


@pytest.mark.parametrize("name", NAMES)
async def test_async(served: Served, name: str) -> None:
    case = for_client(BY_NAME[name], "async")
    check(case, await async_outcome(case, served), {})


class City(BaseModel):
    city: str


def test_answers_are_parsed_into_classes(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        message: Any = {"role": "user", "content": 'Say: {"city": "Oslo"}'}
        chat = client.chat.completions.parse(model=PLAIN, messages=[message], response_format=City)
        assert chat.choices[0].message.parsed == City(city="Oslo")
        response = client.responses.parse(
            model=PLAIN, input='Say: {"city": "Oslo"}', text_format=City
        )
        assert response.output_parsed == City(city="Oslo")


def test_a_conversation_of_responses_goes_on_with_their_output(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        tool: Any = {"type": "function", "name": "f", "parameters": {}, "strict": False}
        text = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
        items: list[Any] = [{"role": "user", "content": f"Say: {text}</tool_call>"}]
        first = client.responses.create(model=TALENTED, input=items, tools=[tool])
        items += first.output
        [call] = [item for item in first.output if item.type == "function_call"]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "fine"})
        items.append({"role": "user", "content": "Prompt:"})
        second = client.responses.create(model=TALENTED, input=items)
        [answer] = [item for item in second.output if item.type == "message"]
        assert "f a=1" in answer.content[0].to_dict()["text"]  # type: ignore[operator]
        assert "f: fine" in second.output_text


def test_a_kept_conversation_is_gone_through_and_deleted(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.keyed_url}/v1", api_key=KEY) as client:
        first = client.responses.create(model=PLAIN, input="Say: One", instructions="Be brief.")
        second = client.responses.create(
            model=PLAIN, input="Prompt:", previous_response_id=first.id
        )
        assert "Say: One" in second.output_text
        assert "Be brief." not in second.output_text
        assert client.responses.retrieve(second.id).output_text == second.output_text
        with client.responses.stream(
            model=PLAIN, input="Say: Three", previous_response_id=second.id
        ) as stream:
            third = stream.get_final_response()
        items = client.responses.input_items.list(third.id, limit=2, order="asc")
        texts = [item.to_dict()["content"][0]["text"] for item in items]  # type: ignore[index]
        assert texts == ["Say: One", "One", "Prompt:", second.output_text, "Say: Three"]
        client.responses.delete(third.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(third.id)
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(second.id)
