"""Tool calls in XML: a name, then parameters one by one, each a text between marks.

Which type a value has only the tool's schema tells. Texts go out as they come; other values are
read to their end first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from services.frontend.parsers.call_stage import CallStage, Step
from services.frontend.parsers.calls import MAX_NAME_CHARACTERS
from services.frontend.parsers.events import Output
from services.frontend.parsers.hermes import CLOSING, OPENING
from services.frontend.parsers.stage import find_mark
from services.frontend.parsers.typed_values import json_of, types_of

ParameterTypes = Callable[[str, str], frozenset[str]]
"""The JSON types of a tool's parameter, by the names of both; empty where nothing is known."""

FUNCTION = "<function="

# As in calls.py: what is matched anew with each piece is bounded.
_GAP = r"\s{0,64}"
_NAME = rf"[^<>{{}}\s]{{1,{MAX_NAME_CHARACTERS}}}"
_KEY = r"[^<>]{1,256}"


@dataclass(frozen=True, slots=True)
class XmlFormat:
    """The marks of one format. Patterns are matched where the one before ended."""

    header: regex.Pattern[str]
    """Up to a call's first parameter, or its end, which is its second group. Its first is the
    name."""
    parameter: regex.Pattern[str]
    """Up to a value. Its group is the key."""
    end: regex.Pattern[str]
    """The end of the parameters. It begins with the mark of its own, if it has one."""
    value_end: str
    """Ends a value, and belongs to it."""
    later_marks: tuple[str, ...]
    """End a value, too, where its own mark is missing."""
    names_are_marked: bool
    """A name has a mark of its own, FUNCTION, which models may write without the one before it."""
    trims_line_breaks: bool
    """A line break at either end of a value is not of it."""


QWEN3_CODER = XmlFormat(
    header=regex.compile(
        rf"{_GAP}<function=({_NAME})>{_GAP}((?:<parameter=|</function>|</tool_call>))"
    ),
    parameter=regex.compile(rf"{_GAP}<parameter=({_KEY})>"),
    end=regex.compile(rf"{_GAP}(?:</function>|(?=</tool_call>))"),
    value_end="</parameter>",
    later_marks=("<parameter=", "</function>"),
    names_are_marked=True,
    trims_line_breaks=True,
)
GLM45 = XmlFormat(
    header=regex.compile(rf"{_GAP}({_NAME}){_GAP}((?:<arg_key>|</tool_call>))"),
    parameter=regex.compile(rf"{_GAP}<arg_key>({_KEY})</arg_key>{_GAP}<arg_value>"),
    end=regex.compile(rf"{_GAP}(?=</tool_call>)"),
    value_end="</arg_value>",
    later_marks=("</tool_call>",),
    names_are_marked=False,
    trims_line_breaks=False,
)


def parameter_types(schemas: Mapping[str, Mapping[str, Any]]) -> ParameterTypes:
    """As the JSON schemas of the tools' arguments say, which are by the tools' names."""

    def types(tool: str, key: str) -> frozenset[str]:
        schema = schemas.get(tool, {})
        properties, definitions = schema.get("properties"), schema.get("$defs")
        named = properties.get(key) if isinstance(properties, Mapping) else None
        return types_of(named, definitions if isinstance(definitions, Mapping) else {})

    return types


class XmlCall:
    """One call. Its arguments are the JSON object that its parameters come to."""

    refused = ""

    def __init__(
        self,
        output: Output,
        marks: XmlFormat,
        types: ParameterTypes,
        *,
        accepts: Callable[[str, bool], bool],
        begun: str = "",
    ) -> None:
        """`accepts` tells whether there may be a call of that name, with parameters or without.
        `begun` is what was read of the call before."""
        self.is_call = False
        self.is_broken = False
        self._output = output
        self._marks = marks
        self._types = types
        self._accepts = accepts
        self._begun = begun
        self._held = begun
        self._rest: str | None = None
        """What follows, once that is known."""
        self._step: Step = self._read_header
        self._name = ""
        self._has_parameters = False
        self._value_types: frozenset[str] = frozenset()
        self._value: list[str] = []
        """Of a value that is no text."""
        self._begins_value = False
        """Nothing of the value was read yet."""

    def feed(self, text: str) -> str | None:
        self._held += text
        while self._held and self._step():
            pass
        return self._rest

    def finish(self) -> str:
        held, self._held = self._held, ""
        if not self.is_call:
            return held[len(self._begun) :]
        if self._step == self._read_value:
            self._begins_value = False
            self._add_value(held)
            self._output.arguments("".join(self._value))
        elif held.strip():
            self._output.arguments(held)
        return ""

    def _read_header(self) -> bool:
        match = self._marks.header.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None or not self._is_accepted(match):
            return self._end(len(self._begun))
        self._name = match.group(1)
        self._held = self._held[match.start(2) :]
        self.is_call = True
        self._output.call(self._name)
        self._output.arguments("{")
        self._step = self._read_parameter
        return True

    def _is_accepted(self, match: regex.Match[str]) -> bool:
        return self._accepts(match.group(1), not match.group(2).startswith("</"))

    def _read_parameter(self) -> bool:
        """Between parameters."""
        begin = self._marks.parameter.match(self._held, partial=True)
        end = self._marks.end.match(self._held, partial=True)
        if begin is not None and not begin.partial:
            self._begin_value(begin.group(1).strip())
            self._held = self._held[begin.end() :]
            return True
        if end is not None and not end.partial:
            self._output.arguments("}")
            return self._end(end.end())
        if begin is not None or end is not None:
            return False
        self.is_broken = True
        return self._end(0)

    def _begin_value(self, key: str) -> None:
        separator = ", " if self._has_parameters else ""
        self._output.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._has_parameters = self._begins_value = True
        self._step = self._read_value
        self._value_types = self._types(self._name, key)
        self._value = []
        if self._is_text:
            self._output.arguments('"')

    @property
    def _is_text(self) -> bool:
        """Where nothing is known of a value it is a text."""
        return not self._value_types - {"string"}

    def _read_value(self) -> bool:
        marks = self._marks
        at, mark = find_mark(self._held, marks.value_end, *marks.later_marks)
        if self._begins_value and marks.trims_line_breaks and self._held.startswith("\n") and at:
            self._held = self._held[1:]
            at -= 1
            self._begins_value = False
        if marks.trims_line_breaks and self._held[:at].endswith("\n"):
            # Of the mark, if one follows.
            text, gap = self._held[: at - 1], 1
        else:
            text, gap = self._held[:at], 0
        if text:
            self._begins_value = False
            self._add_value(text)
        if not mark:
            self._held = self._held[len(text) :]
            return False
        self._end_value()
        self._held = self._held[len(text) + gap :]
        if mark == marks.value_end:
            self._held = self._held[len(mark) :]
        return True

    def _add_value(self, text: str) -> None:
        if self._is_text:
            self._output.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        self._step = self._read_parameter
        value = '"' if self._is_text else json_of("".join(self._value), self._value_types)
        self._output.arguments(value)

    def _end(self, begin: int) -> bool:
        """All from there on is not the call's."""
        self._rest, self._held = self._held[begin:], ""
        return False


class XmlStage(CallStage):
    """Content with calls between marks."""

    def __init__(
        self,
        output: Output,
        marks: XmlFormat,
        tool_names: Collection[str],
        types: ParameterTypes,
    ) -> None:
        super().__init__(output)
        self._marks = marks
        self._tool_names = tool_names
        self._types = types
        self._openings = (OPENING, FUNCTION) if marks.names_are_marked else (OPENING,)

    def _read_content(self) -> bool:
        at, mark = find_mark(self._held, *self._openings)
        self._output.content(self._take(at))
        if not mark:
            return False
        # A function without the mark before it may be anything, unless it is one of the tools.
        begun = "" if mark == OPENING else mark
        accepts = self._accepts if mark == OPENING else self._is_tool
        reader = XmlCall(self._output, self._marks, self._types, accepts=accepts, begun=begun)
        return self._begin_call(reader, self._take(len(mark)))

    def _accepts(self, name: str, has_parameters: bool) -> bool:
        """Nothing but a word between the marks may be anything, too."""
        return has_parameters or self._marks.names_are_marked or name in self._tool_names

    def _is_tool(self, name: str, has_parameters: bool) -> bool:
        return name in self._tool_names

    def _read_after_call(self) -> bool:
        at, mark = find_mark(self._held, CLOSING, *self._openings)
        self._spill(self._take(at))
        if not mark:
            return False
        if mark == CLOSING:
            self._take(len(mark))
        self._reader = None
        self._step = self._read_content
        return True
