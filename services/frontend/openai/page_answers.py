"""What the REST API answers, as the page describes it: the fields that are always there.

Clients look for these; most answers have more, as OpenAI and Anthropic describe them.
"""

from __future__ import annotations

from services.frontend.openai.page_schemas import (
    COUNT,
    TEXT,
    TOKEN_IDS,
    Schema,
    list_of,
    nullable,
    object_of,
    ref,
)

_VECTOR: Schema = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}},
        {**TEXT, "description": "With encoding_format base64: 32-bit floats, little-endian."},
    ]
}
_FINISH_REASON = nullable({"enum": ["stop", "length", "tool_calls", "content_filter"]})
_HEAD: dict[str, Schema] = {"id": TEXT, "created": COUNT, "model": TEXT}
_CHOICE: dict[str, Schema] = {"index": COUNT, "finish_reason": _FINISH_REASON}

_COMPLETIONS = {
    "Usage": object_of(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=object_of(cached_tokens=COUNT),
    ),
    "ChatCompletion": object_of(
        **_HEAD,
        object={"const": "chat.completion"},
        choices=list_of(
            object_of(
                **_CHOICE,
                message=object_of(role={"const": "assistant"}, content=nullable(TEXT)),
            )
        ),
        usage=ref("Usage"),
    ),
    "ChatCompletionChunk": object_of(
        **_HEAD,
        object={"const": "chat.completion.chunk"},
        choices=list_of(object_of(**_CHOICE, delta={"type": "object"})),
    ),
    "Completion": object_of(
        **_HEAD,
        object={"const": "text_completion"},
        choices=list_of(object_of(**_CHOICE, text=TEXT)),
        usage=ref("Usage"),
    ),
    "CompletionChunk": object_of(
        **_HEAD,
        object={"const": "text_completion"},
        choices=list_of(object_of(**_CHOICE, text=TEXT)),
    ),
}

_RESPONSES = {
    "Response": object_of(
        id=TEXT,
        object={"const": "response"},
        created_at=COUNT,
        status={"enum": ["completed", "incomplete", "failed", "in_progress"]},
        model=TEXT,
        output=list_of(object_of(type={"enum": ["message", "reasoning", "function_call"]})),
    ),
    "ResponseEvent": object_of(type=TEXT, sequence_number=COUNT),
    "DeletedResponse": object_of(id=TEXT, object={"const": "response"}, deleted={"const": True}),
    "ResponseItems": object_of(
        object={"const": "list"},
        data=list_of(object_of(id=TEXT, type=TEXT)),
        first_id=TEXT,
        last_id=TEXT,
        has_more={"type": "boolean"},
    ),
}

_MESSAGES = {
    "Message": object_of(
        id=TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=TEXT,
        content=list_of(object_of(type={"enum": ["text", "thinking", "tool_use"]})),
        stop_reason=nullable(TEXT),
        stop_sequence=nullable(TEXT),
        usage=object_of(input_tokens=COUNT, output_tokens=COUNT),
    ),
    "MessageEvent": object_of(type=TEXT),
    "MessageError": object_of(
        type={"const": "error"},
        error=object_of(type=TEXT, message=TEXT),
        request_id=nullable(TEXT),
    ),
    "InputTokens": object_of(input_tokens=COUNT),
}

_EMBEDDINGS = {
    "Embeddings": object_of(
        object={"const": "list"},
        data=list_of(object_of(object={"const": "embedding"}, index=COUNT, embedding=_VECTOR)),
        model=TEXT,
        usage=object_of(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Pooled": object_of(
        id=TEXT,
        object={"const": "list"},
        created=COUNT,
        data=list_of(object_of(object={"const": "pooling"}, index=COUNT, data=_VECTOR)),
        model=TEXT,
        usage=object_of(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
}

_MODELS_AND_TOKENS = {
    "Model": object_of(
        id=TEXT,
        object={"const": "model"},
        created=COUNT,
        owned_by=TEXT,
        root=TEXT,
        task={"enum": ["generate", "embed"]},
        max_model_len=COUNT,
        ready={"type": "boolean", "description": "Whether a request would be taken now."},
        not_ready_reason=nullable(TEXT),
    ),
    "Models": object_of(object={"const": "list"}, data=list_of(ref("Model"))),
    "Tokens": object_of(
        count=COUNT,
        max_model_len=COUNT,
        tokens=TOKEN_IDS,
        token_strs=nullable(list_of(TEXT)),
    ),
    "Text": object_of(prompt=TEXT),
}

_ERROR = object_of(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT))
_STATUS: Schema = {
    "type": "object",
    "properties": {"status": {"const": "ok"}, "models": list_of(TEXT)},
    "required": ["status"],
}

ANSWERS: dict[str, Schema] = {
    "Error": object_of(error=_ERROR),
    **_COMPLETIONS,
    **_RESPONSES,
    **_MESSAGES,
    **_EMBEDDINGS,
    **_MODELS_AND_TOKENS,
    "Status": _STATUS,
}
"""By name."""
