"""How an endpoint writes its answers: OpenAI's chat and completions here, others beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from services.frontend.openai.errors import ApiError
from services.frontend.openai.formats import (
    Answer,
    ChatFormat,
    ChoiceShape,
    Format,
    TextFormat,
    end_chunks,
    error_event,
    whole_answer,
)
from services.frontend.openai.parsed_chat import ParsedChatFormat, ParsedChoice


class Dialect(ABC):
    """The shape of one answer."""

    @property
    @abstractmethod
    def id_prefix(self) -> str:
        """What the answer's id begins with."""

    @abstractmethod
    def shape(self, answer: Answer, index: int, parsed: ParsedChoice | None) -> ChoiceShape:
        """How a choice is written. Without `parsed` its text is its content."""

    @abstractmethod
    def end_chunks(self, answer: Answer) -> bytes:
        """What ends a stream that went well."""

    @abstractmethod
    def whole_answer(self, answer: Answer, choices: Sequence[dict[str, Any]]) -> bytes:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that failed."""


class ChunkDialect(Dialect):
    """Chat and completions: every event is a chunk of the answer."""

    def __init__(self, plain: type[Format]) -> None:
        """`plain` writes choices that need no parser."""
        self._plain = plain

    @property
    def id_prefix(self) -> str:
        return self._plain.id_prefix

    def shape(self, answer: Answer, index: int, parsed: ParsedChoice | None) -> ChoiceShape:
        if parsed is None:
            return self._plain(answer, index)
        return ParsedChatFormat(parsed, answer, index)

    def end_chunks(self, answer: Answer) -> bytes:
        return end_chunks(answer, self._plain.chunk_object)

    def whole_answer(self, answer: Answer, choices: Sequence[dict[str, Any]]) -> bytes:
        return whole_answer(answer, self._plain.whole_object, choices)

    def error_event(self, error: ApiError) -> bytes:
        return error_event(error.body)


CHAT = ChunkDialect(ChatFormat)
TEXT = ChunkDialect(TextFormat)
