"""What the REST API takes, as the page describes it.

Requests are described by the classes that check them. Those take more forms than they say: a field
may be null where it may be left out, and some take one value in place of a list.
"""

from __future__ import annotations

from pydantic import BaseModel

from services.frontend.anthropic import body as messages_body
from services.frontend.anthropic.body import MessagesBody, PromptBody
from services.frontend.openai import embeddings as embeddings_body
from services.frontend.openai import responses_body
from services.frontend.openai.embeddings import EmbeddingBody, PoolingBody
from services.frontend.openai.page_schemas import TEXT, TOKEN_IDS, Schema, list_of, nullable
from services.frontend.openai.responses_body import ResponsesBody, StoredResponsesBody
from services.frontend.openai.schema import (
    IGNORED,
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    ChatBody,
    CompletionBody,
    unoffered_fields,
)
from services.frontend.openai.tokens import DetokenizeBody, TokenizeBody


def _parts_of(*kinds: str) -> Schema:
    part = {
        "type": "object",
        "properties": {"type": {"enum": list(kinds)}, "text": TEXT},
        "required": ["type", "text"],
    }
    return list_of(part)


_FURTHER_FORMS: dict[str, dict[str, list[Schema]]] = {
    "ChatMessage": {"content": [_parts_of("text")]},
    "ChatBody": {"stop": [TEXT]},
    "CompletionBody": {"stop": [TEXT], "prompt": [TEXT, TOKEN_IDS]},
    "ResponsesBody": {"input": [TEXT]},
    "StoredResponsesBody": {"input": [TEXT]},
    "_MessageItem": {"content": [_parts_of("input_text", "output_text")]},
    "_CallOutputItem": {"output": [_parts_of("input_text")]},
    "_ReasoningItem": {
        "content": [_parts_of("reasoning_text")],
        "summary": [_parts_of("summary_text")],
    },
    "EmbeddingBody": {"input": [TEXT, TOKEN_IDS]},
    "PoolingBody": {"input": [TEXT, TOKEN_IDS]},
    "_Message": {"content": [TEXT]},
    "_ToolResultBlock": {"content": [_parts_of("text")]},
    "PromptBody": {"system": [_parts_of("text")]},
    "MessagesBody": {"system": [_parts_of("text")]},
}


def body_schemas(responses_class: type[ResponsesBody]) -> dict[str, Schema]:
    """By name: the bodies, and what they are made of."""
    bodies: tuple[type[BaseModel], ...] = (
        ChatBody,
        CompletionBody,
        responses_class,
        MessagesBody,
        PromptBody,
        EmbeddingBody,
        PoolingBody,
        TokenizeBody,
        DetokenizeBody,
    )
    schemas: dict[str, Schema] = {}
    for body in bodies:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = schema.pop("$defs", {})
        assert all(schemas.get(name, parts[name]) == parts[name] for name in parts)
        schemas |= parts
        schemas[body.__name__] = schema
    for name, schema in schemas.items():
        if "properties" in schema:
            _allow_further_forms(name, schema)
    for body in bodies:
        _put_first(schemas[body.__name__], _unoffered_in(body))
    _put_first(schemas["ChatMessage"], unoffered_fields(NEUTRAL_IN_MESSAGE, frozenset()))
    return schemas


def _allow_further_forms(name: str, schema: Schema) -> None:
    fields = schema["properties"]
    for field, forms in _FURTHER_FORMS.get(name, {}).items():
        fields[field] = {"anyOf": [fields[field], *forms]}
    for field, described in fields.items():
        described.pop("title", None)
        if field not in schema.get("required", ()):
            fields[field] = nullable(described)


def _put_first(schema: Schema, fields: dict[str, Schema]) -> None:
    """The schema's own fields win over these."""
    schema["properties"] = fields | schema["properties"]


def _unoffered_in(body: type[BaseModel]) -> dict[str, Schema]:
    if issubclass(body, StoredResponsesBody):
        return unoffered_fields(responses_body.NEUTRAL_WITH_STORE, responses_body.IGNORED)
    if issubclass(body, ResponsesBody):
        return unoffered_fields(responses_body.NEUTRAL, responses_body.IGNORED)
    if issubclass(body, EmbeddingBody | PoolingBody):
        return unoffered_fields(embeddings_body.NEUTRAL, embeddings_body.IGNORED)
    if issubclass(body, PromptBody):
        return unoffered_fields(messages_body.NEUTRAL, messages_body.IGNORED)
    return unoffered_fields(NEUTRAL, IGNORED)
