"""What all parsers are made of: stages that take text in any pieces and write into one output."""

from __future__ import annotations

from typing import Protocol

from services.frontend.parsers.events import Event, Output

_PIECE_CHARACTERS = 512
"""Stages copy what they hold at each step, so it stays short."""


class Stage(Protocol):
    """Takes a text in pieces. What it makes of it never depends on where the pieces were cut."""

    def feed(self, text: str) -> None:
        """Takes more text."""

    def finish(self) -> None:
        """Lets out what is held back, since nothing follows."""


class OutputParser:
    """Turns what a model writes into events. The concatenation of the events of one kind is the
    same however the text was cut, so streamed and whole answers agree.

    No text is lost: what is not in the format, or not complete, comes out as content.
    """

    def __init__(self, stage: Stage, output: Output) -> None:
        self._stage = stage
        self._output = output

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        for begin in range(0, len(text), _PIECE_CHARACTERS):
            self._stage.feed(text[begin : begin + _PIECE_CHARACTERS])
        return self._output.take()

    def finish(self) -> list[Event]:
        """The rest. Nothing may be fed any more."""
        self._stage.finish()
        self._output.finish()
        return self._output.take()


class ContentStage:
    """For text without tool calls."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def feed(self, text: str) -> None:
        self._output.content(text)

    def finish(self) -> None:
        pass


def find_mark(text: str, *marks: str) -> tuple[int, str]:
    """Where the first of the marks begins, and which it is.

    When there is none the second is empty and the first is where the longest piece at the end
    begins that may still become one.
    """
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    if found:
        return min(found)
    return min(_partial_mark(text, mark) for mark in marks), ""


def _partial_mark(text: str, mark: str) -> int:
    """Where the longest piece at the end begins that may still become the mark."""
    at = text.find(mark[0], max(0, len(text) + 1 - len(mark)))
    while at >= 0:
        if mark.startswith(text[at:]):
            return at
        at = text.find(mark[0], at + 1)
    return len(text)
