"""{"name": ..., "parameters": {...}}, alone or after <|python_tag|>: Llama 3.1 to 3.3.

Without the tag only JSON that an answer begins with, or that follows a call, can be one, and only
with the name of a tool that was offered: other JSON is content.
"""

from __future__ import annotations

from collections.abc import Collection

import regex

from services.frontend.parsers.call_stage import CallStage
from services.frontend.parsers.calls import JsonCall
from services.frontend.parsers.events import Output
from services.frontend.parsers.stage import find_mark

PYTHON_TAG = "<|python_tag|>"

_TAG = regex.escape(PYTHON_TAG)
_BEGIN = regex.compile(rf"\s{{0,64}}({_TAG})?\s{{0,64}}\{{")
_NEXT = regex.compile(rf"\s{{0,64}};?\s{{0,64}}({_TAG})?\s{{0,64}}\{{")
_NO_CALL = regex.compile(rf"[\s;]*(?:{_TAG})?")


class Llama3JsonStage(CallStage):
    """Calls as bare JSON."""

    def __init__(self, output: Output, tool_names: Collection[str]) -> None:
        super().__init__(output)
        self._tool_names = tool_names
        self._step = self._read_beginning

    def _read_beginning(self) -> bool:
        return self._read_call_begin(_BEGIN)

    def _read_content(self) -> bool:
        at, mark = find_mark(self._held, PYTHON_TAG)
        self._output.content(self._take(at))
        if mark:
            self._step = self._read_beginning
        return bool(mark)

    def _read_after_call(self) -> bool:
        assert self._reader is not None
        if self._reader.is_broken:
            self._spill(self._take())
            return False
        return self._read_call_begin(_NEXT)

    def _read_call_begin(self, pattern: regex.Pattern[str]) -> bool:
        match = pattern.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        self._reader = None
        if match is None:
            no_call = _NO_CALL.match(self._held)
            self._output.content(self._take(no_call.end() if no_call else 0))
            self._step = self._read_content
            return True
        is_tagged = bool(match.group(1))
        reader = JsonCall(
            self._output,
            accepts=(lambda _: True) if is_tagged else self._tool_names.__contains__,
            needs_arguments=not is_tagged,
        )
        return self._begin_call(reader, self._take(match.end() - 1))
