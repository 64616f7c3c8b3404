"""Reasoning between marks at the beginning of an answer: <think>, or Mistral's [THINK]."""

from __future__ import annotations

from services.frontend.parsers.events import Output
from services.frontend.parsers.stage import Stage, find_mark


class ThinkStage:
    """Reasoning first, and all after it for the next stage.

    Reasoning begins with the opening mark, or at once when the prompt already ended with it or the
    model is known to leave it out; it ends with the closing mark, or with the answer.
    """

    def __init__(
        self, output: Output, rest: Stage, opening: str, closing: str, *, begins_inside: bool
    ) -> None:
        self._output = output
        self._rest = rest
        self._opening = opening
        self._closing = closing
        self._begins_inside = begins_inside
        self._held = ""
        self._is_begun = False
        self._is_over = False

    def feed(self, text: str) -> None:
        if self._is_over:
            self._rest.feed(text)
            return
        self._held += text
        if not self._is_begun and not self._begin():
            return
        end, mark = find_mark(self._held, self._closing)
        self._output.reasoning(self._held[:end])
        self._held = self._held[end:]
        if mark:
            self._end(self._held[len(mark) :])

    def finish(self) -> None:
        if not self._is_over and self._held:
            held, self._held = self._held, ""
            if self._is_begun or self._begins_inside:
                self._output.reasoning(held)
            else:
                self._rest.feed(held)
        self._rest.finish()

    def _begin(self) -> bool:
        """Whether the answer is known to begin with reasoning."""
        start = self._held.lstrip()
        if len(start) < len(self._opening) and self._opening.startswith(start):
            return False
        self._is_begun = True
        if start.startswith(self._opening):
            self._held = start[len(self._opening) :]
        elif not self._begins_inside:
            self._is_over = True
            held, self._held = self._held, ""
            self._rest.feed(held)
            return False
        return True

    def _end(self, rest: str) -> None:
        self._output.end_reasoning()
        self._is_over = True
        self._held = ""
        if rest:
            self._rest.feed(rest)
