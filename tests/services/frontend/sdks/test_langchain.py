"""langchain-openai, by way of chat completions and of responses."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.services.frontend.sdks.scripted import PLAIN, TALENTED, VECTORS, Served

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"4 C in {city}"


class City(BaseModel):
    """A city."""

    city: str


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def is_responses(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def model(served: Served, name: str, is_responses: bool) -> ChatOpenAI:
    return ChatOpenAI(
        model=name,
        base_url=f"{served.url}/v1",
        api_key="none",
        max_retries=0,
        use_responses_api=is_responses,
    )


def test_an_answer(served: Served, is_responses: bool) -> None:
    answer = model(served, PLAIN, is_responses).invoke("Say: Hello")
    assert answer.text == "Hello"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 6


def test_a_stream(served: Served, is_responses: bool) -> None:
    chunks = [*model(served, PLAIN, is_responses).stream("Say: Hello there")]
    assert "".join(chunk.text for chunk in chunks) == "Hello there"


async def test_async_streams(served: Served) -> None:
    # In one event loop, since connections are kept for all models of a URL.
    for is_responses in (False, True):
        chunks = [chunk async for chunk in model(served, PLAIN, is_responses).astream("Say: Hi")]
        assert "".join(chunk.text for chunk in chunks) == "Hi"


def test_tools(served: Served, is_responses: bool) -> None:
    with_tools = model(served, TALENTED, is_responses).bind_tools([get_weather])
    question = HumanMessage(f"Say: {CALL}")
    answer = with_tools.invoke([question])
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    found = get_weather.invoke(call)
    assert isinstance(found, ToolMessage)
    prompt = with_tools.invoke([question, answer, found, HumanMessage("Prompt:")])
    assert "get_weather: 4 C in Oslo" in prompt.text


def test_structured_output(served: Served, is_responses: bool) -> None:
    structured = model(served, PLAIN, is_responses).with_structured_output(City)
    assert structured.invoke('Say: {"city": "Oslo"}') == City(city="Oslo")


def test_errors(served: Served, is_responses: bool) -> None:
    with pytest.raises(openai.NotFoundError):
        model(served, "nobody", is_responses).invoke("Hi")


def embeddings(served: Served, name: str, **given: Any) -> OpenAIEmbeddings:
    options: Any = {"base_url": f"{served.url}/v1", "api_key": "none", **given}
    return OpenAIEmbeddings(model=name, check_embedding_ctx_length=False, **options)


async def test_embeddings(served: Served) -> None:
    async with openai.DefaultAsyncHttpxClient() as http:  # It would leave its own one open.
        made = embeddings(served, VECTORS, http_async_client=http)
        assert made.embed_query("Hi")[0] == 2
        assert [one[0] for one in made.embed_documents(["a", "abc"])] == [1, 3]
        assert (await made.aembed_query("Hi"))[0] == 2


def test_a_model_that_generates_refuses_embeddings(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support embeddings"):
        embeddings(served, PLAIN).embed_query("Hi")
