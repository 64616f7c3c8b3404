"""Every answer is as OpenAI's own description of its API says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.services.frontend.sdks.cases import CASES, at, for_client
from tests.services.frontend.sdks.scripted import Served
from tests.services.frontend.sdks.test_openai_python import KEYS

DOCUMENT: dict[str, Any] = json.loads(Path(__file__).with_name("openai_schemas.json").read_text())
VALIDATORS = {
    name: jsonschema_rs.validator_for({**DOCUMENT, "$ref": f"#/$defs/{name}"})
    for name in (
        "CreateChatCompletionResponse",
        "CreateChatCompletionStreamResponse",
        "CreateCompletionResponse",
        "CreateEmbeddingResponse",
        "ErrorResponse",
        "ListModelsResponse",
        "Model",
        "Response",
        "ResponseItemList",
        "ResponseStreamEvent",
    )
}

PATHS = {
    "chat.completions.create": "/v1/chat/completions",
    "completions.create": "/v1/completions",
    "embeddings.create": "/v1/embeddings",
    "models.list": "/v1/models",
    "models.retrieve": "/v1/models/",
    "moderations.create": "/v1/moderations",
    "responses.create": "/v1/responses",
    "responses.retrieve": "/v1/responses/",
}
WHOLE = {
    "chat.completions.create": "CreateChatCompletionResponse",
    "completions.create": "CreateCompletionResponse",
    "embeddings.create": "CreateEmbeddingResponse",
    "models.list": "ListModelsResponse",
    "models.retrieve": "Model",
    "responses.create": "Response",
}
PIECES = {
    "chat.completions.create": "CreateChatCompletionStreamResponse",
    "completions.create": "CreateCompletionResponse",
    "responses.create": "ResponseStreamEvent",
}
ENDLESS = ("Never", "Forever")

ANSWERED = [
    case["name"]
    for case in CASES
    if case.get("key") != "nobody" and not any(f"{verb}:" in json.dumps(case) for verb in ENDLESS)
]


def problems(schema: str, value: object) -> list[str]:
    return [
        f"{schema} at {error.instance_path}: {error.message}"
        for error in VALIDATORS[schema].iter_errors(value)
    ]


def ask(case: dict[str, Any], served: Served) -> httpx.Response:
    url = served.keyed_url if "key" in case else served.url
    headers = {"authorization": f"Bearer {KEYS[case['key']]}"} if "key" in case else {}
    path = url + PATHS[case["call"]] + "".join(case.get("args", ()))
    if "body" not in case:
        return httpx.get(path, headers=headers)
    body = case["body"] | case.get("extra_body", {})
    return httpx.post(path, json=body, headers=headers, timeout=30)


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_are_valid(served: Served, name: str) -> None:
    [case] = [for_client(case, "schemas") for case in CASES if case["name"] == name]
    answer = ask(case, served)
    if answer.status_code != 200:
        assert problems("ErrorResponse", answer.json()) == []
        return
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert problems(WHOLE[case["call"]], answer.json()) == []
        return
    found = [line[len("data: ") :] for line in answer.text.split("\n") if line.startswith("data: ")]
    has_end = found[-1] == "[DONE]"
    events = [json.loads(data) for data in (found[:-1] if has_end else found)]
    assert has_end == (case["call"] != "responses.create" and "error" not in events[-1])
    for event in events:
        schema = "ErrorResponse" if "error" in event else PIECES[case["call"]]
        assert problems(schema, event) == []


def test_a_kept_response_and_its_items_are_valid(served: Served) -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Say: Hi"},
        {"role": "assistant", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "fine"},
        {"role": "user", "content": "Say: <think>\nHm.\n</think>\n\nYes"},
    ]
    headers = {"authorization": f"Bearer {KEYS['good']}"}
    with httpx.Client(base_url=f"{served.keyed_url}/v1", headers=headers, timeout=30) as client:
        body = {"model": "talented", "input": items}
        made = client.post("/responses", json=body).json()
        assert problems("Response", made) == []
        assert client.get(f"/responses/{made['id']}").json() == made
        body = {"model": "talented", "input": "Say: No", "previous_response_id": made["id"]}
        after = client.post("/responses", json=body).json()
        assert problems("Response", after) == []
        listed = client.get(f"/responses/{after['id']}/input_items").json()
        assert len(listed["data"]) == len(items) + len(made["output"]) + 1
        assert problems("ResponseItemList", listed) == []
        del listed["data"][0]["id"]
        assert problems("ResponseItemList", listed)


@pytest.mark.parametrize(
    ("schema", "case", "path", "value"),
    [
        ("CreateChatCompletionResponse", "a whole chat answer", "choices.0", {"index": 0}),
        ("CreateChatCompletionResponse", "a whole chat answer", "choices.0.finish_reason", "done"),
        ("Response", "a response", "output.0.content.0", {"type": "output_text", "text": "a"}),
        ("CreateEmbeddingResponse", "an embedding", "data.0.embedding", "AAAA"),
        ("Response", "a response", "usage.output_tokens", None),
    ],
)
def test_answers_that_are_wrong_are_found(
    served: Served, schema: str, case: str, path: str, value: object
) -> None:
    [found] = [one for one in CASES if one["name"] == case]
    answer = ask(found, served).json()
    *owner, last = path.split(".")
    holder = at(answer, ".".join(owner))
    holder[int(last) if isinstance(holder, list) else last] = value
    assert problems(schema, answer)
