"""Answers in OpenAI's shape, as bytes.

A stream's chunks differ only in their text, so all around it is made once for each request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from services.frontend.completion import Completion
from switchgear.common.v1 import generation_pb2

DONE = b"data: [DONE]\n\n"

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
_SPLIT = "\x00"
"""Stands where the text goes while the chunk around it is made."""


class Format(ABC):
    """One answer's bytes."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, answer_id: str, model: str, created: int, *, includes_usage: bool) -> None:
        """`created` is in seconds since 1970."""
        self._head = {"id": answer_id, "created": created, "model": model}
        self._usage_in_chunks: dict[str, Any] = {"usage": None} if includes_usage else {}
        self._includes_usage = includes_usage
        before, after = self._chunk(self._part(_SPLIT), None).split(orjson.dumps(_SPLIT))
        self._before_text, self._after_text = before, after

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]:
        """How a choice of a chunk carries text."""

    @abstractmethod
    def _last_part(self) -> dict[str, Any]:
        """What a choice of the chunk with the finish reason carries instead."""

    @abstractmethod
    def _whole(self, text: str) -> dict[str, Any]:
        """How a choice of a whole answer carries text."""

    def first_chunk(self) -> bytes:
        """What comes before any text."""
        return b""

    def text_chunk(self, text: str) -> bytes:
        """One server-sent event with new text."""
        return b"%b%b%b" % (self._before_text, orjson.dumps(text), self._after_text)

    def last_chunks(self, completion: Completion) -> bytes:
        """The events after the last text."""
        chunks = self._chunk(self._last_part(), _FINISH_REASONS[completion.finish_reason])
        if self._includes_usage:
            chunks += _event(
                self._head
                | {"object": self.chunk_object, "choices": [], "usage": _usage([completion])}
            )
        return chunks + DONE

    def whole(self, completions: Sequence[Completion], texts: Sequence[str]) -> bytes:
        """The body of an answer that is not streamed: one choice for each completion."""
        choices = [
            {
                "index": index,
                **self._whole(text),
                "logprobs": None,
                "finish_reason": _FINISH_REASONS[completion.finish_reason],
            }
            for index, (completion, text) in enumerate(zip(completions, texts, strict=True))
        ]
        return orjson.dumps(
            self._head
            | {"object": self.whole_object, "choices": choices, "usage": _usage(completions)}
        )

    def _chunk(self, part: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish_reason}
        return _event(
            self._head | {"object": self.chunk_object, "choices": [choice]} | self._usage_in_chunks
        )


class ChatFormat(Format):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _last_part(self) -> dict[str, Any]:
        return {"delta": {}}

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def first_chunk(self) -> bytes:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)


class TextFormat(Format):
    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _last_part(self) -> dict[str, Any]:
        return {"text": ""}

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


def error_event(body: bytes) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %b\n\n" % body


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(fields)


def _usage(completions: Sequence[Completion]) -> dict[str, Any]:
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    completion_tokens = sum(completion.completion_tokens for completion in completions)
    cached_tokens = sum(completion.cached_tokens for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
