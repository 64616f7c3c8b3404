"""Calls in a section of their own, each between marks, with arguments in JSON.

Kimi:     <section><call>functions.f:0<arguments>{...}<end of call>...<end of section>
DeepSeek: <section><call>function<separator>f, a line with ```json, {...}, a line with ```, <end of
          call>...<end of section> (V3), or <call>f<separator>{...}<end of call> (V3.1)
"""

from __future__ import annotations

from dataclasses import dataclass

import regex

from services.frontend.parsers.call_stage import CallStage
from services.frontend.parsers.calls import Arguments
from services.frontend.parsers.events import Output
from services.frontend.parsers.stage import find_mark

# As in calls.py: what is matched anew with each piece is bounded.
_GAP = r"\s{0,64}"
_NAME = r"(?P<name>[\w.\-]{1,256})"
_ARGUMENTS = rf'{_GAP}(?P<arguments>\{{){_GAP}["}}]'


@dataclass(frozen=True, slots=True)
class SectionFormat:
    """The marks of one format. The first four are as the model has them for tokens."""

    section: str
    section_end: str
    call: str
    call_end: str
    other_marks: tuple[str, ...]
    """Between a call's first mark and its arguments."""
    header: str
    """A pattern of what is between a call's mark and its arguments, with the group `name` and, if
    the model has ids of its own, `id`."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them."""
        return (self.section, self.section_end, self.call, self.call_end, *self.other_marks)


_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"

KIMI_K2 = SectionFormat(
    section="<|tool_calls_section_begin|>",
    section_end="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    other_marks=(_KIMI_ARGUMENTS,),
    header=rf"{_GAP}(?P<id>(?:functions\.)?{_NAME}:\d{{1,9}}){_GAP}{regex.escape(_KIMI_ARGUMENTS)}",
)
DEEPSEEK_V3 = SectionFormat(
    section="<｜tool▁calls▁begin｜>",
    section_end="<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    other_marks=(_DEEPSEEK_SEPARATOR,),
    header=rf"(?:function{_DEEPSEEK_SEPARATOR}{_NAME}{_GAP}```json|{_NAME}{_DEEPSEEK_SEPARATOR})",
)


class SectionStage(CallStage):
    """Content, and sections of calls."""

    def __init__(self, output: Output, marks: SectionFormat) -> None:
        super().__init__(output)
        self._marks = marks
        section, call = regex.escape(marks.section), regex.escape(marks.call)
        self._header = regex.compile(rf"(?:{section}{_GAP})?{call}{marks.header}{_ARGUMENTS}")
        self._tail = regex.compile(rf"{_GAP}(?:```{_GAP})?{regex.escape(marks.call_end)}")
        self._section_end = regex.compile(rf"{_GAP}{regex.escape(marks.section_end)}")

    def _read_content(self) -> bool:
        marks = self._marks
        at, mark = find_mark(self._held, marks.section, marks.call)
        self._output.content(self._take(at))
        if not mark:
            return False
        match = self._header.match(self._held, partial=True)
        if match is None:
            self._output.content(self._take(len(mark)))
            return True
        if match.partial:
            return False
        self._output.call(match["name"], match.groupdict().get("id") or "")
        self._take(match.start("arguments"))
        return self._begin_call(Arguments(self._output), "")

    def _read_after_call(self) -> bool:
        assert self._reader is not None
        match = None if self._reader.is_broken else self._tail.match(self._held, partial=True)
        if match is None:
            self._step = self._read_to_end
            return True
        if match.partial:
            return False
        self._take(match.end())
        self._end_call()
        return True

    def _read_to_end(self) -> bool:
        """Up to where a call that was not as it should be ends, or another begins."""
        marks = self._marks
        at, mark = find_mark(
            self._held, marks.call_end, marks.section_end, marks.call, marks.section
        )
        self._spill(self._take(at))
        if not mark:
            return False
        if mark == marks.call_end:
            self._take(len(mark))
        self._end_call()
        return True

    def _end_call(self) -> None:
        self._reader = None
        self._step = self._read_after_end

    def _read_after_end(self) -> bool:
        """The section may end here."""
        match = self._section_end.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is not None:
            self._take(match.end())
        self._step = self._read_content
        return True
