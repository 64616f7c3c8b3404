"""What the formats with tool calls in JSON have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from services.frontend.parsers.calls import CallReader
from services.frontend.parsers.events import Output

Step = Callable[[], bool]
"""Reads on in what is held. False while more text is wanted."""


class CallStage(ABC):
    """Content with calls in it. A subclass says where a call begins and what follows one."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._held = ""
        self._step: Step = self._read_content
        self._reader: CallReader | None = None
        self._lead = ""
        """What was read before the reader's text, as content in case it is no call."""

    @abstractmethod
    def _read_content(self) -> bool:
        """Up to where a call may begin."""

    @abstractmethod
    def _read_after_call(self) -> bool:
        """After a call; the reader is still there to be asked how it ended."""

    def feed(self, text: str) -> None:
        self._held += text
        while self._held and self._step():
            pass

    def finish(self) -> None:
        held = self._take()
        if self._reader is None or self._step != self._read_call:
            self._spill(held)
        elif self._reader.is_call:
            self._output.content(self._reader.finish())
        else:
            self._output.content(self._lead + self._reader.finish())

    def _begin_call(self, reader: CallReader, lead: str) -> bool:
        self._reader, self._lead = reader, lead
        self._step = self._read_call
        return True

    def _read_call(self) -> bool:
        assert self._reader is not None
        rest = self._reader.feed(self._take())
        if rest is None:
            return False
        self._held = rest
        if self._reader.is_call:
            self._output.content(self._reader.refused)
            self._step = self._read_after_call
        else:
            self._output.content(self._lead + self._reader.refused)
            self._reader = None
            self._step = self._read_content
        return True

    def _spill(self, text: str) -> None:
        """Lets out text outside calls. After broken arguments it belongs to them."""
        if self._reader is not None and self._reader.is_broken:
            self._output.arguments(text)
        else:
            self._output.content(text)

    def _take(self, end: int | None = None) -> str:
        """Takes what is held, or as much of it."""
        end = len(self._held) if end is None else end
        taken, self._held = self._held[:end], self._held[end:]
        return taken
