"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes 2 and 3, Qwen 2.5 and 3."""

from __future__ import annotations

from services.frontend.parsers.call_stage import CallStage
from services.frontend.parsers.calls import JsonCall
from services.frontend.parsers.stage import find_mark

OPENING = "<tool_call>"
CLOSING = "</tool_call>"


class HermesStage(CallStage):
    """Content with calls between marks."""

    def _read_content(self) -> bool:
        at, mark = find_mark(self._held, OPENING)
        self._output.content(self._take(at))
        if not mark:
            return False
        reader = JsonCall(self._output, accepts=lambda _: True, needs_arguments=False)
        return self._begin_call(reader, self._take(len(mark)))

    def _read_after_call(self) -> bool:
        at, mark = find_mark(self._held, CLOSING, OPENING)
        self._spill(self._take(at))
        if not mark:
            return False
        if mark == CLOSING:
            self._take(len(mark))
        self._reader = None
        self._step = self._read_content
        return True
