"""Runs parsers over transcripts and puts their events together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from services.frontend.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from services.frontend.parsers.formats import ModelFormat, Parsing

TOOL_NAMES = frozenset({"get_weather", "get_time", "find-it"})


@dataclass
class Answer:
    """What a client ends up with."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All there is, for seeing whether something was lost."""
        return self.reasoning + self.content + "".join(map("".join, self.calls))


def answer_of(events: Iterable[Event]) -> Answer:
    """Joins events, which must come in the order that clients rely on."""
    answer = Answer()
    for event in events:
        match event:
            case Reasoning(text):
                assert text
                answer.reasoning += text
            case Content(text):
                assert text
                answer.content += text
            case CallStart(index, name):
                assert index == len(answer.calls)
                answer.calls.append((name, ""))
            case CallArguments(index, text):
                assert text
                assert index == len(answer.calls) - 1, "arguments of a call that is not the last"
                name, arguments = answer.calls[index]
                answer.calls[index] = (name, arguments + text)
    return answer


def parsing(
    tools: str = "none",
    reasoning: str = "none",
    *,
    forced: str | None = None,
    required: bool = False,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
) -> Parsing:
    return Parsing(
        ModelFormat(tools, reasoning),
        TOOL_NAMES,
        schemas or {},
        forced_name=forced,
        are_calls_required=required,
    )


def read(how: Parsing, text: str, cuts: Sequence[int] = (), prompt_end: str = "") -> Answer:
    """The answer, from a text cut at these places."""
    parser = how.parser(prompt_end)
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    events: list[Event] = []
    for begin, end in pairwise(borders):
        events += parser.feed(text[begin:end])
    return answer_of(events + parser.finish())


def read_by_character(how: Parsing, text: str, prompt_end: str = "") -> Answer:
    return read(how, text, range(len(text)), prompt_end)
