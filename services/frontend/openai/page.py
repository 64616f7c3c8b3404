"""The page that describes the REST API, at /openapi.json and, for people, at /docs.

Requests are described by the classes that check them. Those take more forms than they say: a field
may be null where it may be left out, and some take one value in place of a list.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel

from services.frontend.anthropic import body as messages_body
from services.frontend.anthropic.body import MessagesBody, PromptBody
from services.frontend.openai import embeddings as embeddings_body
from services.frontend.openai import responses_body
from services.frontend.openai.embeddings import EmbeddingBody, PoolingBody
from services.frontend.openai.responses_body import ResponsesBody, StoredResponsesBody
from services.frontend.openai.schema import (
    IGNORED,
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    ChatBody,
    CompletionBody,
    unoffered_fields,
)
from services.frontend.openai.stored_responses import DEFAULT_PAGE_ITEMS, MAX_PAGE_ITEMS
from services.frontend.openai.tokens import DetokenizeBody, TokenizeBody

TITLE = "Switchgear"

_Schema = dict[str, Any]
_NULL: _Schema = {"type": "null"}
_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_TOKEN_IDS: _Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


_VECTOR: _Schema = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}},
        {**_TEXT, "description": "With encoding_format base64: 32-bit floats, little-endian."},
    ]
}


def _parts_of(*kinds: str) -> _Schema:
    part = {
        "type": "object",
        "properties": {"type": {"enum": list(kinds)}, "text": _TEXT},
        "required": ["type", "text"],
    }
    return {"type": "array", "items": part}


_FURTHER_FORMS: dict[str, dict[str, list[_Schema]]] = {
    "ChatMessage": {"content": [_parts_of("text")]},
    "ChatBody": {"stop": [_TEXT]},
    "CompletionBody": {"stop": [_TEXT], "prompt": [_TEXT, _TOKEN_IDS]},
    "ResponsesBody": {"input": [_TEXT]},
    "StoredResponsesBody": {"input": [_TEXT]},
    "_MessageItem": {"content": [_parts_of("input_text", "output_text")]},
    "_CallOutputItem": {"output": [_parts_of("input_text")]},
    "_ReasoningItem": {
        "content": [_parts_of("reasoning_text")],
        "summary": [_parts_of("summary_text")],
    },
    "EmbeddingBody": {"input": [_TEXT, _TOKEN_IDS]},
    "PoolingBody": {"input": [_TEXT, _TOKEN_IDS]},
    "_Message": {"content": [_TEXT]},
    "_ToolResultBlock": {"content": [_parts_of("text")]},
    "PromptBody": {"system": [_parts_of("text")]},
    "MessagesBody": {"system": [_parts_of("text")]},
}

_ERRORS = {
    400: "A field is missing, unknown, malformed or out of range; or the context is too small.",
    401: "An API key is asked for, and none or an unknown one was sent.",
    403: "The API key is not for this model.",
    404: "Nobody serves a model of this name, or nothing is kept under this id.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not of type application/json.",
    429: "Too busy, or a limit of the API key is reached. Come back after Retry-After.",
    500: "A bug. Its text is in the server's log.",
    503: "The model, or what is kept, is not to be had just now. Come back after Retry-After.",
    504: "The request took longer than it may.",
}
_POST_ERRORS = tuple(_ERRORS)
_GET_ERRORS = (401, 429, 500, 503)


def _object(**properties: _Schema) -> _Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _nullable(schema: _Schema) -> _Schema:
    return {"anyOf": [schema, _NULL]}


def _list_of(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answers() -> dict[str, _Schema]:
    finish_reason = _nullable({"enum": ["stop", "length", "tool_calls", "content_filter"]})
    head = {"id": _TEXT, "created": _COUNT, "model": _TEXT}
    choice = {"index": _COUNT, "finish_reason": finish_reason}
    error = {"message": _TEXT, "type": _TEXT, "param": _nullable(_TEXT), "code": _nullable(_TEXT)}
    return {
        "Error": _object(error=_object(**error)),
        "Usage": _object(
            prompt_tokens=_COUNT,
            completion_tokens=_COUNT,
            total_tokens=_COUNT,
            prompt_tokens_details=_object(cached_tokens=_COUNT),
        ),
        "ChatCompletion": _object(
            **head,
            object={"const": "chat.completion"},
            choices=_list_of(
                _object(
                    **choice,
                    message=_object(role={"const": "assistant"}, content=_nullable(_TEXT)),
                )
            ),
            usage=_ref("Usage"),
        ),
        "ChatCompletionChunk": _object(
            **head,
            object={"const": "chat.completion.chunk"},
            choices=_list_of(_object(**choice, delta={"type": "object"})),
        ),
        "Completion": _object(
            **head,
            object={"const": "text_completion"},
            choices=_list_of(_object(**choice, text=_TEXT)),
            usage=_ref("Usage"),
        ),
        "CompletionChunk": _object(
            **head,
            object={"const": "text_completion"},
            choices=_list_of(_object(**choice, text=_TEXT)),
        ),
        "Response": _object(
            id=_TEXT,
            object={"const": "response"},
            created_at=_COUNT,
            status={"enum": ["completed", "incomplete", "failed", "in_progress"]},
            model=_TEXT,
            output=_list_of(_object(type={"enum": ["message", "reasoning", "function_call"]})),
        ),
        "ResponseEvent": _object(type=_TEXT, sequence_number=_COUNT),
        "Message": _object(
            id=_TEXT,
            type={"const": "message"},
            role={"const": "assistant"},
            model=_TEXT,
            content=_list_of(_object(type={"enum": ["text", "thinking", "tool_use"]})),
            stop_reason=_nullable(_TEXT),
            stop_sequence=_nullable(_TEXT),
            usage=_object(input_tokens=_COUNT, output_tokens=_COUNT),
        ),
        "MessageEvent": _object(type=_TEXT),
        "MessageError": _object(
            type={"const": "error"},
            error=_object(type=_TEXT, message=_TEXT),
            request_id=_nullable(_TEXT),
        ),
        "DeletedResponse": _object(id=_TEXT, object={"const": "response"}, deleted={"const": True}),
        "ResponseItems": _object(
            object={"const": "list"},
            data=_list_of(_object(id=_TEXT, type=_TEXT)),
            first_id=_TEXT,
            last_id=_TEXT,
            has_more={"type": "boolean"},
        ),
        "Embeddings": _object(
            object={"const": "list"},
            data=_list_of(_object(object={"const": "embedding"}, index=_COUNT, embedding=_VECTOR)),
            model=_TEXT,
            usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        "Pooled": _object(
            id=_TEXT,
            object={"const": "list"},
            created=_COUNT,
            data=_list_of(_object(object={"const": "pooling"}, index=_COUNT, data=_VECTOR)),
            model=_TEXT,
            usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        "InputTokens": _object(input_tokens=_COUNT),
        "Model": _object(
            id=_TEXT,
            object={"const": "model"},
            created=_COUNT,
            owned_by=_TEXT,
            root=_TEXT,
            task={"enum": ["generate", "embed"]},
            max_model_len=_COUNT,
            ready={"type": "boolean", "description": "Whether a request would be taken now."},
            not_ready_reason=_nullable(_TEXT),
        ),
        "Models": _object(object={"const": "list"}, data=_list_of(_ref("Model"))),
        "Tokens": _object(
            count=_COUNT,
            max_model_len=_COUNT,
            tokens=_TOKEN_IDS,
            token_strs=_nullable(_list_of(_TEXT)),
        ),
        "Text": _object(prompt=_TEXT),
        "Status": {
            "type": "object",
            "properties": {"status": {"const": "ok"}, "models": _list_of(_TEXT)},
            "required": ["status"],
        },
    }


def _requests(responses_class: type[ResponsesBody]) -> dict[str, _Schema]:
    schemas: dict[str, _Schema] = {}
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
    for body in bodies:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        named = schema.pop("$defs", {})
        assert all(schemas.get(name, named[name]) == named[name] for name in named)
        schemas |= named
        schemas[body.__name__] = schema
    for name, schema in schemas.items():
        if "properties" not in schema:
            continue
        for field, forms in _FURTHER_FORMS.get(name, {}).items():
            schema["properties"][field] = {"anyOf": [schema["properties"][field], *forms]}
        for field, described in schema["properties"].items():
            described.pop("title", None)
            if field not in schema.get("required", ()):
                schema["properties"][field] = _nullable(described)
    for body in bodies:
        schema = schemas[body.__name__]
        schema["properties"] = _unoffered_in(body) | schema["properties"]
    message = schemas["ChatMessage"]
    message["properties"] = (
        unoffered_fields(NEUTRAL_IN_MESSAGE, frozenset()) | message["properties"]
    )
    return schemas


def _unoffered_in(body: type[BaseModel]) -> dict[str, _Schema]:
    if issubclass(body, StoredResponsesBody):
        return unoffered_fields(responses_body.NEUTRAL_WITH_STORE, responses_body.IGNORED)
    if issubclass(body, ResponsesBody):
        return unoffered_fields(responses_body.NEUTRAL, responses_body.IGNORED)
    if issubclass(body, EmbeddingBody | PoolingBody):
        return unoffered_fields(embeddings_body.NEUTRAL, embeddings_body.IGNORED)
    if issubclass(body, PromptBody):
        return unoffered_fields(messages_body.NEUTRAL, messages_body.IGNORED)
    return unoffered_fields(NEUTRAL, IGNORED)


def _json_content(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}


def _responses(answer: _Schema, errors: tuple[int, ...], error: str = "Error") -> _Schema:
    return {"200": answer} | {
        str(status): {"description": _ERRORS[status], "content": _json_content(_ref(error))}
        for status in errors
    }


def _post(summary: str, body: str, content: _Schema, error: str = "Error") -> _Schema:
    operation = {
        "summary": summary,
        "requestBody": {"required": True, "content": _json_content(_ref(body))},
        "responses": _responses({"description": summary, "content": content}, _POST_ERRORS, error),
    }
    return {"post": operation}


def _get(summary: str, answer: str, *, errors: tuple[int, ...] = _GET_ERRORS) -> _Schema:
    content = _json_content(_ref(answer))
    operation: _Schema = {
        "summary": summary,
        "responses": _responses({"description": summary, "content": content}, errors),
    }
    return {"get": operation}


def _streamed(whole: str, chunk: str) -> _Schema:
    event = _object(data={"anyOf": [{"const": "[DONE]"}, _event_data(chunk, "Error")]})
    event["description"] = "One server-sent event. The last is [DONE], or an Error."
    return _json_content(_ref(whole)) | {"text/event-stream": {"schema": event}}


def _event_data(*schemas: str) -> _Schema:
    return {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(schema) for schema in schemas]},
    }


def _streamed_by_name(whole: str, *events: str) -> _Schema:
    event = _object(event=_TEXT, data=_event_data(*events))
    event["description"] = "One server-sent event, named for its type."
    return _json_content(_ref(whole)) | {"text/event-stream": {"schema": event}}


def _path_parameter(name: str, description: str) -> _Schema:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": _TEXT,
    }


def _query_parameter(name: str, schema: _Schema) -> _Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_STORED_ERRORS = (400, 401, 404, 429, 500, 503)


def _stored_paths() -> dict[str, _Schema]:
    """Where responses are kept."""
    response_id = [_path_parameter("response_id", "The id that the response was answered with.")]
    include = _query_parameter(
        "include",
        _list_of({"enum": ["message.output_text.logprobs", "reasoning.encrypted_content"]}),
    )
    one = _get("A response that is kept", "Response", errors=_STORED_ERRORS)
    one["get"]["parameters"] = [include]
    one["delete"] = _get("Delete a response", "DeletedResponse", errors=_STORED_ERRORS)["get"]
    items = _get("What a response was given", "ResponseItems", errors=_STORED_ERRORS)
    items["get"]["parameters"] = [
        _query_parameter(
            "limit",
            {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_PAGE_ITEMS,
                "default": DEFAULT_PAGE_ITEMS,
            },
        ),
        _query_parameter("order", {"enum": ["asc", "desc"], "default": "desc"}),
        _query_parameter("after", _TEXT),
        include,
    ]
    return {
        "/v1/responses/{response_id}": one | {"parameters": response_id},
        "/v1/responses/{response_id}/input_items": items | {"parameters": response_id},
    }


@cache
def openapi_page(*, keeps_responses: bool = False) -> dict[str, Any]:
    """The whole page, in OpenAPI 3.1."""
    responses_class = StoredResponsesBody if keeps_responses else ResponsesBody
    model = _get(
        "Describe a model, and why it can't be served now", "Model", errors=(401, 403, 404)
    )
    model["get"]["parameters"] = [_path_parameter("model", "A name or alias; may have slashes.")]
    ready = _get("Whether a request would be taken now", "Status", errors=(503,))
    ready["get"]["security"] = []
    live = _get("Whether the process runs", "Status", errors=())
    live["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "version": "1",
            "description": "OpenAI's API as far as it is offered, with vLLM's extensions, "
            "and Anthropic's Messages API.",
        },
        "security": [{"api_key": []}, {}],
        "paths": {
            "/v1/chat/completions": _post(
                "Continue a conversation",
                "ChatBody",
                _streamed("ChatCompletion", "ChatCompletionChunk"),
            ),
            "/v1/completions": _post(
                "Continue a text", "CompletionBody", _streamed("Completion", "CompletionChunk")
            ),
            "/v1/responses": _post(
                "Continue a conversation, in items",
                responses_class.__name__,
                _streamed_by_name("Response", "ResponseEvent"),
            ),
            **(_stored_paths() if keeps_responses else {}),
            "/v1/messages": _post(
                "Continue a conversation, in Anthropic's shape",
                "MessagesBody",
                _streamed_by_name("Message", "MessageEvent", "MessageError"),
                "MessageError",
            ),
            "/v1/messages/count_tokens": _post(
                "Count the tokens of a prompt, in Anthropic's shape",
                "PromptBody",
                _json_content(_ref("InputTokens")),
                "MessageError",
            ),
            "/v1/embeddings": _post(
                "Embed texts", "EmbeddingBody", _json_content(_ref("Embeddings"))
            ),
            "/pooling": _post(
                "Embed texts, in vLLM's shape", "PoolingBody", _json_content(_ref("Pooled"))
            ),
            "/v1/models": _get("List the models that can be served now", "Models"),
            "/v1/models/{model}": model,
            "/tokenize": _post(
                "Tokens of a text or messages", "TokenizeBody", _json_content(_ref("Tokens"))
            ),
            "/detokenize": _post("Text of tokens", "DetokenizeBody", _json_content(_ref("Text"))),
            "/health": ready,
            "/ready": ready,
            "/live": live,
        },
        "components": {
            "schemas": _answers() | _requests(responses_class),
            "securitySchemes": {
                "api_key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only where API keys are asked for.",
                }
            },
        },
    }
