"""What a parser lets out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts the calls of an answer from 0."""

    index: int
    name: str
    call_id: str = ""
    """The model's own name for the call, where it has one."""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as the model wrote them: a piece of JSON."""

    index: int
    text: str


Event: TypeAlias = Reasoning | Content | CallStart | CallArguments


class Output:
    """Collects events until they are taken, and trims what belongs to marks rather than to text.

    Newlines right after a mark and white space right before one are the format's. So white space is
    held back until it is known what follows it; when only the end follows, it is text again.
    """

    def __init__(self) -> None:
        self.calls = 0
        """Tool calls so far."""
        self._events: list[Event] = []
        self._gap = ""
        """White space that may turn out to be a mark's."""
        self._is_reasoning = False
        """What the gap belongs to."""
        self._has_reasoning = False
        self._has_content = False
        self._is_marked = False
        """A mark came: newlines before the first content are its."""
        self._follows_call = False

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def reasoning(self, text: str) -> None:
        self._is_reasoning = True
        if not self._has_reasoning:
            text, self._gap = (self._gap + text).lstrip("\r\n"), ""
        if certain := self._without_gap(text):
            self._has_reasoning = True
            self._events.append(Reasoning(certain))

    def end_reasoning(self) -> None:
        """The mark after it has come."""
        self._gap = ""
        self._is_reasoning = False
        self._is_marked = True

    def content(self, text: str) -> None:
        if self._is_marked and not self._has_content:
            text, self._gap = (self._gap + text).lstrip("\r\n"), ""
        if certain := self._without_gap(text):
            self._has_content = True
            self._follows_call = False
            self._events.append(Content(certain))

    def call(self, name: str, call_id: str = "") -> None:
        """A tool call begins; its arguments follow."""
        self._gap = ""
        self._is_marked = self._follows_call = True
        self._events.append(CallStart(self.calls, name, call_id))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self._events.append(CallArguments(self.calls - 1, text))

    def finish(self) -> None:
        """Nothing follows."""
        if self._gap and not self._follows_call:
            self._events.append(Reasoning(self._gap) if self._is_reasoning else Content(self._gap))
        self._gap = ""

    def _without_gap(self, text: str) -> str:
        """All but the white space at the end, which is held back; empty for nothing but that."""
        certain = text.rstrip()
        if not certain:
            self._gap += text
            return ""
        held, self._gap = self._gap, text[len(certain) :]
        return held + certain
