"""The page that describes the REST API, as people and programs get it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from services.frontend.openai.page import openapi_page
from tests.services.frontend.byte_model import NAME
from tests.services.frontend.frontends import frontend

USER = {"role": "user", "content": "Hi"}


async def page_of(folder: Path) -> dict[str, Any]:
    async with frontend(folder) as started:
        page: dict[str, Any] = (await started.client.get("/openapi.json")).json()
        people = await started.client.get("/docs")
        assert "/openapi.json" in people.text
        return page


async def test_the_page_has_every_endpoint_and_no_loose_end(tmp_path: Path) -> None:
    page = await page_of(tmp_path)
    assert set(page["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/pooling",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/live",
    }
    text = json.dumps(page)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(page["components"]["schemas"])


async def test_the_page_for_people_needs_nothing_from_elsewhere_and_no_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text("{}")
    async with frontend(tmp_path, api_keys=str(keys)) as started:
        page = await started.client.get("/docs")
        wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert [url for url in wanted if not url.startswith("/")] == []
        answers = [await started.client.get(url) for url in wanted]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert any(b"SwaggerUIBundle" in answer.content for answer in answers)


def test_where_responses_are_kept_the_page_says_so() -> None:
    page = openapi_page(keeps_responses=True)
    path = "/v1/responses/{response_id}"
    assert set(page["paths"]) - set(openapi_page()["paths"]) == {path, f"{path}/input_items"}
    schema = {"$ref": "#/components/schemas/StoredResponsesBody", "components": page["components"]}
    body = {"model": NAME, "input": "a", "store": True, "previous_response_id": "resp-1"}
    assert jsonschema_rs.is_valid(schema, body)
    assert not jsonschema_rs.is_valid(schema, body | {"background": True})


@pytest.mark.parametrize(
    ("schema", "body", "is_valid"),
    [
        ("ChatBody", {"model": NAME, "messages": [USER]}, True),
        ("ChatBody", {"model": NAME, "messages": [USER], "stop": "a", "n": 1}, True),
        ("ChatBody", {"model": NAME, "messages": [USER], "top_p": None, "user": "u"}, True),
        ("ChatBody", {"model": NAME, "messages": []}, False),
        ("ChatBody", {"model": NAME, "messages": [USER], "tempreature": 1}, False),
        ("ChatBody", {"model": NAME, "messages": [USER], "temperature": 3}, False),
        ("CompletionBody", {"model": NAME, "prompt": "a"}, True),
        ("CompletionBody", {"model": NAME, "prompt": [1, 2]}, True),
        ("CompletionBody", {"model": NAME, "prompt": [[1], [2]]}, True),
        ("CompletionBody", {"model": NAME, "prompt": 3}, False),
        ("CompletionBody", {"prompt": "a"}, False),
        ("ResponsesBody", {"model": NAME, "input": "a"}, True),
        ("ResponsesBody", {"model": NAME, "input": [USER], "store": False}, True),
        ("ResponsesBody", {"model": NAME, "input": [USER], "store": True}, False),
        ("ResponsesBody", {"model": NAME, "input": [{"type": "computer_call"}]}, False),
        ("MessagesBody", {"model": NAME, "messages": [USER], "max_tokens": 1}, True),
        ("MessagesBody", {"model": NAME, "messages": [USER]}, False),
        ("PromptBody", {"model": NAME, "messages": [USER], "system": "a"}, True),
        ("TokenizeBody", {"messages": [USER]}, True),
        ("DetokenizeBody", {"tokens": [-1]}, False),
    ],
)
async def test_the_page_tells_good_bodies_from_bad_ones(
    tmp_path: Path, schema: str, body: dict[str, Any], is_valid: bool
) -> None:
    page = await page_of(tmp_path)
    whole = {"$ref": f"#/components/schemas/{schema}", "components": page["components"]}
    assert jsonschema_rs.is_valid(whole, body) == is_valid
