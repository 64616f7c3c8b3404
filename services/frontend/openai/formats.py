"""Answers in OpenAI's shape, as bytes.

A stream's chunks differ in little but their text, so all around it is made once for each choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

import msgspec
import orjson

from services.frontend.completion import Completion
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.models import ServedModel
from services.frontend.openai.logprobs import chat_logprobs, text_logprobs
from switchgear.common.v1 import generation_pb2

DONE = b"data: [DONE]\n\n"

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
_SPLIT = "\x00"
"""Stands where the text goes while the chunk around it is made."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all chunks and choices of an answer have in common."""

    answer_id: str
    model: ServedModel
    created: int
    """In seconds since 1970."""
    service_tier: str | None = None
    """None when the caller did not ask for one."""
    usage: Callable[[], dict[str, Any]]
    """So far; as chat completions have it."""
    includes_usage: bool = False
    """Whether a stream ends with the usage."""
    includes_usage_so_far: bool = False
    """Whether every chunk of a stream has it."""

    def head(self, kind: str) -> dict[str, Any]:
        """The fields at the start of every object of the answer."""
        head = {
            "id": self.answer_id,
            "created": self.created,
            "model": self.model.name,
            "object": kind,
        }
        return head if self.service_tier is None else head | {"service_tier": "default"}


class ChoiceShape(Protocol):
    """The bytes of one choice of an answer."""

    def first_chunk(self) -> bytes:
        """What comes before any text."""

    def text_chunk(self, text: str, logprobs: Sequence[TokenLogprobs] | None = None) -> bytes:
        """New text."""

    def last_chunk(self, completion: Completion) -> bytes:
        """What comes after the last text."""

    def whole(
        self, text: str, logprobs: Sequence[TokenLogprobs] | None, completion: Completion
    ) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""


class Format(ABC):
    """A choice in the chunks of chat and completions."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, answer: Answer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._head = answer.head(self.chunk_object)
        self._is_plain = not answer.includes_usage_so_far

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]:
        """How a choice of a chunk carries text."""

    @abstractmethod
    def _last_part(self) -> dict[str, Any]:
        """What a choice of the chunk with the finish reason carries instead."""

    @abstractmethod
    def _whole(self, text: str) -> dict[str, Any]:
        """How a choice of a whole answer carries text."""

    @abstractmethod
    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """How a choice carries log probabilities."""

    def first_chunk(self) -> bytes:
        """What comes before any text."""
        return b""

    def text_chunk(self, text: str, logprobs: Sequence[TokenLogprobs] | None = None) -> bytes:
        """One server-sent event with new text."""
        if logprobs is None and self._is_plain:
            before, after = self._around_text
            return b"%b%b%b" % (before, orjson.dumps(text), after)
        return self._chunk(self._part(text), None, logprobs)

    @cached_property
    def _around_text(self) -> tuple[bytes, bytes]:
        before, after = self._chunk(self._part(_SPLIT), None).split(orjson.dumps(_SPLIT))
        return before, after

    def last_chunk(self, completion: Completion) -> bytes:
        """The event after the last text."""
        return self._chunk(self._last_part(), self._finish_reason(completion))

    def whole(
        self, text: str, logprobs: Sequence[TokenLogprobs] | None, completion: Completion
    ) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        return {
            "index": self._index,
            **self._whole(text),
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": self._finish_reason(completion),
        }

    def _finish_reason(self, completion: Completion) -> str:
        return _FINISH_REASONS[completion.finish_reason]

    def _chunk(
        self,
        part: dict[str, Any],
        finish_reason: str | None,
        logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> bytes:
        choice = {
            "index": self._index,
            **part,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        chunk = self._head | {"choices": [choice]}
        if self._answer.includes_usage_so_far:
            chunk["usage"] = self._answer.usage()
        elif self._answer.includes_usage:
            chunk["usage"] = None
        return _event(chunk)


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

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return chat_logprobs(found, self._answer.model.tokenizer)

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

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return text_logprobs(found, self._answer.model.tokenizer)


def end_chunks(answer: Answer, kind: str) -> bytes:
    """What ends a stream that went well."""
    if not answer.includes_usage:
        return DONE
    return _event(answer.head(kind) | {"choices": [], "usage": answer.usage()}) + DONE


def whole_answer(answer: Answer, kind: str, choices: Sequence[dict[str, Any]]) -> bytes:
    """The body of an answer that is not streamed."""
    return orjson.dumps(answer.head(kind) | {"choices": choices, "usage": answer.usage()})


def error_event(body: bytes) -> bytes:
    """The last event of a stream that failed."""
    return b"data: %b\n\n" % body


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(fields)


def usage_of(completions: Sequence[Completion], choices_per_prompt: int) -> dict[str, Any]:
    """A prompt counts once, however many choices it has."""
    prompts = completions[::choices_per_prompt]
    prompt_tokens = sum(completion.prompt_tokens for completion in prompts)
    completion_tokens = sum(completion.completion_tokens for completion in completions)
    cached_tokens = sum(completion.cached_tokens for completion in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
