"""Answers that are a sequence of items (reasoning, text, tool calls) and have one choice only.

OpenAI's responses and Anthropic's messages are such; they differ in what they call an item's
beginning, its pieces and its end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import orjson

from services.frontend.completion import Completion
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.openai.dialect import Dialect
from services.frontend.openai.formats import Answer
from services.frontend.openai.parsed_chat import ParsedChoice
from switchgear.common.v1 import generation_pb2

Kind: TypeAlias = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Item:
    """One item of an answer."""

    kind: Kind
    index: int
    """Its place in the answer."""
    call_id: str = ""
    name: str = ""
    """Of the function that is called."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of a text."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it holds so far; of a call, its arguments."""
        return "".join(self.pieces)


class ItemDialect(Dialect):
    """Writes an answer as its items come: at most one is open, the last.

    Whole answers come out of the same steps, without their events.
    """

    answer: Answer
    """Set by `shape`, as is what goes with it."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.is_begun = False
        self.is_whole = False
        """No events are made."""
        self.has_calls = False
        self.is_cut = False
        """The answer ended for its length."""
        self.stop_string = ""
        """The one that ended it, if one did."""
        self._is_open = False
        self._logprobs: list[TokenLogprobs] = []
        """Of text that is held back."""

    def shape(self, answer: Answer, index: int, parsed: ParsedChoice | None) -> ItemDialect:
        assert index == 0
        self.answer = answer
        self._parsed = parsed
        return self

    @abstractmethod
    def begin(self) -> bytes:
        """The events before any item."""

    @abstractmethod
    def open(self, item: Item) -> bytes:
        """The events of an item that begins."""

    @abstractmethod
    def piece(self, item: Item, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        """The event of more text, or arguments, in an item."""

    @abstractmethod
    def close(self, item: Item, *, is_cut: bool) -> bytes:
        """The events of an item that is complete, or was cut off for its length."""

    def first_chunk(self) -> bytes:
        self.is_begun = True
        return self.begin()

    def text_chunk(self, text: str, logprobs: Sequence[TokenLogprobs] | None = None) -> bytes:
        """Log probabilities go with the next text: which of the tokens are text and which are not
        can't be told."""
        self._logprobs += logprobs or ()
        if self._parsed is None:
            return self._add("text", text) if text else b""
        return self._add_deltas(self._parsed.deltas(text))

    def last_chunk(self, completion: Completion) -> bytes:
        chunk = self._add_deltas(self._parsed.last_deltas()) if self._parsed is not None else b""
        if not self.items:
            chunk += self._open(Item("text", 0))
        if self.items[-1].kind == "text":
            self.items[-1].logprobs += self._logprobs
        self.is_cut = completion.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        self.stop_string = completion.stop_string
        return chunk + self._close(is_cut=self.is_cut)

    def whole(
        self, text: str, logprobs: Sequence[TokenLogprobs] | None, completion: Completion
    ) -> dict[str, Any]:
        """Nothing: the items are what there is."""
        self.is_whole = True
        self.text_chunk(text, logprobs)
        self.last_chunk(completion)
        return {}

    def _add_deltas(self, deltas: Sequence[dict[str, Any]]) -> bytes:
        chunk = b""
        for delta in deltas:
            if text := delta.get("reasoning"):
                chunk += self._add("reasoning", text)
            elif text := delta.get("content"):
                chunk += self._add("text", text)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    self.has_calls = True
                    name = call["function"]["name"]
                    chunk += self._close() + self._open(
                        Item("call", len(self.items), call_id=call["id"], name=name)
                    )
                if arguments := call["function"]["arguments"]:
                    chunk += self._add("call", arguments)
        return chunk

    def _add(self, kind: Kind, text: str) -> bytes:
        chunk = b""
        if not self._is_open or self.items[-1].kind != kind:
            chunk = self._close() + self._open(Item(kind, len(self.items)))
        item = self.items[-1]
        item.pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        if kind == "text":
            item.logprobs += logprobs
        return chunk + (b"" if self.is_whole else self.piece(item, text, logprobs))

    def _open(self, item: Item) -> bytes:
        self.items.append(item)
        self._is_open = True
        return b"" if self.is_whole else self.open(item)

    def _close(self, *, is_cut: bool = False) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        return b"" if self.is_whole else self.close(self.items[-1], is_cut=is_cut)


def named_event(fields: dict[str, Any]) -> bytes:
    """A server-sent event that is named for its type."""
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), orjson.dumps(fields))
