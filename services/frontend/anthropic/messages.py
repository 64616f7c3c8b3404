"""Answers of POST /v1/messages, whole and as events; and the count of a prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from services.frontend.access import Caller
from services.frontend.anthropic.body import PromptBody
from services.frontend.anthropic.errors import error_body
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.openai.errors import ApiError
from services.frontend.openai.formats import Answer
from services.frontend.openai.items import Item, ItemDialect, named_event
from services.frontend.pipeline import Pipeline


class MessagesDialect(ItemDialect):
    """One message; its items are called blocks."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self._request_id = request_id

    @property
    def id_prefix(self) -> str:
        return "msg"

    def begin(self) -> bytes:
        return named_event({"type": "message_start", "message": self._message([])})

    def open(self, item: Item) -> bytes:
        block = self._block(item)
        return named_event(
            {"type": "content_block_start", "index": item.index, "content_block": block}
        )

    def piece(self, item: Item, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        match item.kind:
            case "text":
                delta = {"type": "text_delta", "text": text}
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": text}
            case "call":
                delta = {"type": "input_json_delta", "partial_json": text}
        return named_event({"type": "content_block_delta", "index": item.index, "delta": delta})

    def close(self, item: Item, *, is_cut: bool) -> bytes:
        return named_event({"type": "content_block_stop", "index": item.index})

    def end_chunks(self, answer: Answer) -> bytes:
        last = {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        return named_event(last) + named_event({"type": "message_stop"})

    def whole_answer(self, answer: Answer, choices: Sequence[dict[str, Any]]) -> bytes:
        blocks = [self._block(item) for item in self.items]
        return orjson.dumps(self._message(blocks) | self._ending())

    def error_event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error_body(error, self._request_id)

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self.answer.model.name,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _block(self, item: Item) -> dict[str, Any]:
        match item.kind:
            case "text":
                return {"type": "text", "text": item.text, "citations": None}
            case "reasoning":
                # Nothing is signed; whatever thinking comes back is taken.
                return {"type": "thinking", "thinking": item.text, "signature": ""}
            case "call":
                called = {"name": item.name, "input": _input_of(item.text)}
                return {"type": "tool_use", "id": item.call_id, **called}

    def _usage(self) -> dict[str, Any]:
        """So far. Of the prompt's tokens, those that were cached are counted apart."""
        usage = self.answer.usage()
        cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached_tokens,
            "output_tokens": usage["completion_tokens"],
        }

    def _ending(self) -> dict[str, Any]:
        if self.stop_string:
            reason = "stop_sequence"
        elif self.is_cut:
            reason = "max_tokens"
        else:
            reason = "tool_use" if self.has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": self.stop_string or None}


def _input_of(arguments: str) -> dict[str, Any]:
    """Arguments that the model did not write as an object, or not to the end, can't be told."""
    try:
        found = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


async def count_tokens(pipeline: Pipeline, caller: Caller, body: PromptBody) -> dict[str, Any]:
    """The answer to /v1/messages/count_tokens."""
    chat = body.chat()
    with pipeline.admitted(caller):
        model = pipeline.model_for(caller, body.model)
        chat.parsing(model)
        return {"input_tokens": len(await pipeline.tokenise(model, chat.chat()))}
