"""Answers that were forced to be tool calls: nothing but JSON of a schema."""

from __future__ import annotations

import regex

from services.frontend.parsers.call_stage import CallStage
from services.frontend.parsers.calls import Arguments, CallArray
from services.frontend.parsers.events import Output

_OBJECT = regex.compile(r"\s{0,64}(\{)")


class NamedCallStage(CallStage):
    """The arguments of one function and nothing else."""

    def __init__(self, output: Output, name: str) -> None:
        super().__init__(output)
        self._name = name
        self._step = self._read_beginning

    def _read_beginning(self) -> bool:
        match = _OBJECT.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None:
            self._step = self._read_content
            return True
        self._take(match.start(1))
        self._output.call(self._name)
        return self._begin_call(Arguments(self._output), "")

    def _read_content(self) -> bool:
        self._spill(self._take())
        return False

    _read_after_call = _read_content


class RequiredCallsStage(CallStage):
    """An array of calls: [{"name": ..., "parameters": {...}}, ...]."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._begin_call(CallArray(output, accepts=lambda _: True), "")

    def _read_content(self) -> bool:
        self._spill(self._take())
        return False

    _read_after_call = _read_content
