"""Calls after [TOOL_CALLS], in the forms of Mistral's tokenizers:

[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]          up to version 7
[TOOL_CALLS]f{...}[TOOL_CALLS]g{...}                          from version 11
[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{...}, or without id     versions 11 and 13
"""

from __future__ import annotations

import regex

from services.frontend.parsers.call_stage import CallStage
from services.frontend.parsers.calls import Arguments, CallArray, JsonCall
from services.frontend.parsers.stage import find_mark

TOOL_CALLS = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"

_FORM = regex.compile(r"\s{0,64}(\S)")
_NAMED = regex.compile(
    r"\s{0,64}([\w.\-]{1,256})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s{0,64}(\{)\s{0,64}[\"}]"
)


class MistralStage(CallStage):
    """Content, then calls."""

    def _read_content(self) -> bool:
        at, mark = find_mark(self._held, TOOL_CALLS)
        self._output.content(self._take(at))
        if not mark:
            return False
        self._lead = self._take(len(mark))
        self._step = self._read_form
        return True

    def _read_form(self) -> bool:
        match = _FORM.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        match match and match.group(1):
            case "[":
                array = CallArray(self._output, accepts=lambda _: True)
                return self._begin_call(array, self._lead)
            case "{":
                call = JsonCall(self._output, accepts=lambda _: True, needs_arguments=False)
                return self._begin_call(call, self._lead)
            case _:
                return self._read_name()

    def _read_name(self) -> bool:
        match = _NAMED.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None:
            self._output.content(self._lead)
            self._lead = ""
            self._step = self._read_content
            return True
        self._take(match.start(2))
        self._output.call(match.group(1))
        return self._begin_call(Arguments(self._output), "")

    def _read_after_call(self) -> bool:
        at, mark = find_mark(self._held, TOOL_CALLS)
        self._spill(self._take(at))
        if mark:
            self._reader = None
            self._step = self._read_content
        return bool(mark)

    def finish(self) -> None:
        if self._step == self._read_form:
            self._held = self._lead + self._held
        super().finish()
