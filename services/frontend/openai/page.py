"""The page that describes the REST API, at /openapi.json and, for people, at /docs."""

from __future__ import annotations

from functools import cache
from typing import Any

from services.frontend.openai.page_answers import ANSWERS
from services.frontend.openai.page_bodies import body_schemas
from services.frontend.openai.page_schemas import TEXT, Schema, list_of, object_of, ref
from services.frontend.openai.responses_body import ResponsesBody, StoredResponsesBody
from services.frontend.openai.stored_responses import DEFAULT_PAGE_ITEMS, MAX_PAGE_ITEMS

TITLE = "Switchgear"

PAGE_ASSETS = "/docs/assets"
"""Where the page for people has its script and style: browsers need not reach anything else."""

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
_STORED_ERRORS = (400, 401, 404, 429, 500, 503)


def _json_content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _responses(answer: Schema, errors: tuple[int, ...], error: str = "Error") -> Schema:
    return {"200": answer} | {
        str(status): {"description": _ERRORS[status], "content": _json_content(ref(error))}
        for status in errors
    }


def _post(summary: str, body: str, content: Schema, error: str = "Error") -> Schema:
    operation = {
        "summary": summary,
        "requestBody": {"required": True, "content": _json_content(ref(body))},
        "responses": _responses({"description": summary, "content": content}, _POST_ERRORS, error),
    }
    return {"post": operation}


def _get(summary: str, answer: str, *, errors: tuple[int, ...] = _GET_ERRORS) -> Schema:
    content = _json_content(ref(answer))
    operation: Schema = {
        "summary": summary,
        "responses": _responses({"description": summary, "content": content}, errors),
    }
    return {"get": operation}


def _streamed(whole: str, chunk: str) -> Schema:
    event = object_of(data={"anyOf": [{"const": "[DONE]"}, _event_data(chunk, "Error")]})
    event["description"] = "One server-sent event. The last is [DONE], or an Error."
    return _json_content(ref(whole)) | {"text/event-stream": {"schema": event}}


def _event_data(*schemas: str) -> Schema:
    return {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [ref(schema) for schema in schemas]},
    }


def _streamed_by_name(whole: str, *events: str) -> Schema:
    event = object_of(event=TEXT, data=_event_data(*events))
    event["description"] = "One server-sent event, named for its type."
    return _json_content(ref(whole)) | {"text/event-stream": {"schema": event}}


def _path_parameter(name: str, description: str) -> Schema:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": TEXT,
    }


def _query_parameter(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _stored_paths() -> dict[str, Schema]:
    """Where responses are kept."""
    response_id = [_path_parameter("response_id", "The id that the response was answered with.")]
    include = _query_parameter(
        "include",
        list_of({"enum": ["message.output_text.logprobs", "reasoning.encrypted_content"]}),
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
        _query_parameter("after", TEXT),
        include,
    ]
    return {
        "/v1/responses/{response_id}": one | {"parameters": response_id},
        "/v1/responses/{response_id}/input_items": items | {"parameters": response_id},
    }


def _model_paths() -> dict[str, Schema]:
    """What can be served, and whether it can be served now."""
    model = _get(
        "Describe a model, and why it can't be served now", "Model", errors=(401, 403, 404)
    )
    model["get"]["parameters"] = [_path_parameter("model", "A name or alias; may have slashes.")]
    ready = _get("Whether a request would be taken now", "Status", errors=(503,))
    ready["get"]["security"] = []
    live = _get("Whether the process runs", "Status", errors=())
    live["get"]["security"] = []
    return {
        "/v1/models": _get("List the models that can be served now", "Models"),
        "/v1/models/{model}": model,
        "/health": ready,
        "/ready": ready,
        "/live": live,
    }


def _paths(responses_body: str) -> dict[str, Schema]:
    """Where requests are sent."""
    return {
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
            responses_body,
            _streamed_by_name("Response", "ResponseEvent"),
        ),
        "/v1/messages": _post(
            "Continue a conversation, in Anthropic's shape",
            "MessagesBody",
            _streamed_by_name("Message", "MessageEvent", "MessageError"),
            "MessageError",
        ),
        "/v1/messages/count_tokens": _post(
            "Count the tokens of a prompt, in Anthropic's shape",
            "PromptBody",
            _json_content(ref("InputTokens")),
            "MessageError",
        ),
        "/v1/embeddings": _post("Embed texts", "EmbeddingBody", _json_content(ref("Embeddings"))),
        "/pooling": _post(
            "Embed texts, in vLLM's shape", "PoolingBody", _json_content(ref("Pooled"))
        ),
        "/tokenize": _post(
            "Tokens of a text or messages", "TokenizeBody", _json_content(ref("Tokens"))
        ),
        "/detokenize": _post("Text of tokens", "DetokenizeBody", _json_content(ref("Text"))),
    }


@cache
def openapi_page(*, keeps_responses: bool = False) -> dict[str, Any]:
    """The whole page, in OpenAPI 3.1."""
    responses_class = StoredResponsesBody if keeps_responses else ResponsesBody
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "version": "1",
            "description": "OpenAI's API as far as it is offered, with vLLM's extensions, "
            "and Anthropic's Messages API.",
        },
        "security": [{"api_key": []}, {}],
        "paths": _paths(responses_class.__name__)
        | (_stored_paths() if keeps_responses else {})
        | _model_paths(),
        "components": {
            "schemas": ANSWERS | body_schemas(responses_class),
            "securitySchemes": {
                "api_key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only where API keys are asked for.",
                }
            },
        },
    }
