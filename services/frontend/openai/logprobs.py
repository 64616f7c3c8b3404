"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.tokenizer import ModelTokenizer

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for tokens that can't be, since JSON has no infinity."""


def chat_logprobs(found: Sequence[TokenLogprobs], tokenizer: ModelTokenizer) -> dict[str, Any]:
    """As chat completions have them."""
    return {
        "content": [
            _chat_token(tokenizer, token.token_id, token.logprob)
            | {
                "top_logprobs": [
                    _chat_token(tokenizer, candidate, logprob)
                    for candidate, logprob in token.alternatives
                ]
            }
            for token in found
        ],
        "refusal": None,
    }


def text_logprobs(found: Sequence[TokenLogprobs], tokenizer: ModelTokenizer) -> dict[str, Any]:
    """As completions have them: columns, in which the token is always among the likeliest."""
    return {
        "tokens": [_text_of(tokenizer, token.token_id) for token in found],
        "token_logprobs": [_finite(token.logprob) for token in found],
        "top_logprobs": [
            None
            if token.logprob is None
            else {
                _text_of(tokenizer, candidate): _finite(logprob)
                for candidate, logprob in (*token.alternatives, (token.token_id, token.logprob))
            }
            for token in found
        ],
        "text_offset": [token.begin for token in found],
    }


def _chat_token(tokenizer: ModelTokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": _text_of(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": [*tokenizer.token_bytes(token_id)],
    }


def _text_of(tokenizer: ModelTokenizer, token_id: int) -> str:
    """A token that is not whole characters goes by its bytes, so that different ones differ."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
