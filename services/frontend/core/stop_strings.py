"""Ends a text at the first stop string, however it is cut into pieces.

The text is a stream of characters: it ends with the first character that completes a stop string,
and loses the longest stop string that this character completes, unless it is to be kept. What might
still become a stop string that is to be lost is held back, so that no part of one is ever let out.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Knuth-Morris-Pratt over each stop string, side by side; the state survives between pieces."""

    def __init__(self, stop_strings: Sequence[str], *, keeps_stop: bool = False) -> None:
        """`stop_strings` are not empty strings."""
        self._keeps_stop = keeps_stop
        self._patterns = [(stop, _borders(stop)) for stop in stop_strings]
        self._matched = [0] * len(self._patterns)
        self._held = ""
        self.stop_string = ""
        """The one that was found, after which nothing may be fed any more; empty before."""

    @property
    def is_stopped(self) -> bool:
        return bool(self.stop_string)

    def feed(self, piece: str) -> str:
        """The text that is now certain to be before any stop string."""
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            if longest := self._advance(text[end]):
                self.stop_string = longest
                self._held = ""
                return text[: end + 1 - (0 if self._keeps_stop else len(longest))]
        certain = len(text) - (0 if self._keeps_stop else max(self._matched, default=0))
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text held back, once it is known that no more follows."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._patterns)
        return held

    def _advance(self, character: str) -> str:
        """Takes one character; the longest stop string that it completes, or an empty one."""
        longest = ""
        for index, (stop, borders) in enumerate(self._patterns):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, stop, key=len)
                matched = borders[-1]
            self._matched[index] = matched
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    for index in range(1, len(stop)):
        border = borders[index - 1]
        while border and stop[border] != stop[index]:
            border = borders[border - 1]
        borders[index] = border + (stop[border] == stop[index])
    return borders
