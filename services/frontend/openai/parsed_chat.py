"""Chat answers whose text is taken apart: reasoning, content, and tool calls."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Sequence
from typing import Any

from services.frontend.completion import Completion
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.openai.formats import Answer, ChatFormat
from services.frontend.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from services.frontend.parsers.stage import OutputParser

_LETTERS = string.ascii_letters + string.digits


def new_call_id(*, is_short: bool) -> str:
    """A name for a tool call. Short ones are what Mistral's templates take."""
    letters = "".join(random.choices(_LETTERS, k=9 if is_short else 24))
    return letters if is_short else f"call_{letters}"


class ParsedChoice:
    """One choice's events in OpenAI's shape."""

    def __init__(
        self,
        parser: OutputParser,
        *,
        includes_reasoning: bool,
        max_calls: int | None,
        has_short_call_ids: bool,
    ) -> None:
        """Of more calls than `max_calls` the later ones are left out."""
        self.has_calls = False
        self._parser = parser
        self._includes_reasoning = includes_reasoning
        self._max_calls = max_calls
        self._has_short_call_ids = has_short_call_ids

    def deltas(self, text: str) -> list[dict[str, Any]]:
        """What a text adds to the message, in order."""
        return self._deltas(self._parser.feed(text))

    def last_deltas(self) -> list[dict[str, Any]]:
        """What was held back until it was known that no text follows."""
        return self._deltas(self._parser.finish())

    def message(self, text: str) -> dict[str, Any]:
        """The message of the whole text."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for delta in self.deltas(text) + self.last_deltas():
            content += delta.get("content", "")
            reasoning += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({key: call[key] for key in ("id", "type", "function")})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if not calls and not reasoning:
            message["content"] = content
        message["refusal"] = None
        if reasoning:
            message |= _reasoning(reasoning)
        if calls:
            message["tool_calls"] = calls
        return message

    def _deltas(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return _reasoning(text) if self._includes_reasoning else None
            case CallStart(index) | CallArguments(index) if self._is_beyond(index):
                return None
            case CallStart(index, name, own_id):
                self.has_calls = True
                call_id = own_id or new_call_id(is_short=self._has_short_call_ids)
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _is_beyond(self, index: int) -> bool:
        return self._max_calls is not None and index >= self._max_calls


def _reasoning(text: str) -> dict[str, Any]:
    """Under the name that vLLM has now, and the one that it and others had before."""
    return {"reasoning": text, "reasoning_content": text}


class ParsedChatFormat(ChatFormat):
    """A chat answer with a parser over its text."""

    def __init__(
        self,
        parsed: ParsedChoice,
        answer: Answer,
        index: int,
    ) -> None:
        super().__init__(answer, index)
        self._parsed = parsed

    def first_chunk(self) -> bytes:
        # Whether there will be content is not known.
        return self._chunk({"delta": {"role": "assistant", "content": None}}, None)

    def text_chunk(self, text: str, logprobs: Sequence[TokenLogprobs] | None = None) -> bytes:
        return self._delta_chunks(self._parsed.deltas(text), logprobs)

    def last_chunk(self, completion: Completion) -> bytes:
        return self._delta_chunks(self._parsed.last_deltas()) + super().last_chunk(completion)

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": self._parsed.message(text)}

    def _finish_reason(self, completion: Completion) -> str:
        reason = super()._finish_reason(completion)
        return "tool_calls" if self._parsed.has_calls and reason == "stop" else reason

    def _delta_chunks(
        self, deltas: Sequence[dict[str, Any]], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> bytes:
        """The log probabilities go with the first: which delta a token is in can't be told."""
        if logprobs and not deltas:
            deltas = [{}]
        return b"".join(
            self._chunk({"delta": delta}, None, None if number else logprobs)
            for number, delta in enumerate(deltas)
        )
