"""Where a JSON object or array ends, found piece by piece."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]|[^\s:,\-+.0-9A-Za-z]')
"""Brackets, quotes, and what can't be in JSON outside a string."""
_INSIDE = re.compile(r'["\\]')
_CLOSED_BY = {"{": "}", "[": "]"}


class JsonEnd:
    """Counts brackets outside strings. Reads no values: what is between brackets may be wrong."""

    def __init__(self) -> None:
        self.is_closed = False
        """The bracket that the text began with is closed."""
        self.is_broken = False
        """The text can't be JSON."""
        self._open: list[str] = []
        """The closing brackets that are due."""
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str, begin: int = 0) -> int:
        """Reads from `begin` on; how far.

        That is the end of the text, or behind the last bracket, or at what breaks it. The first
        character ever is an opening bracket.
        """
        at = begin
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if match is None:
                return len(text)
            at = match.end()
            character = match.group()
            if self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = self._is_escaped
            elif character == '"':
                self._in_string = True
            elif character in _CLOSED_BY:
                self._open.append(_CLOSED_BY[character])
            elif character != self._open.pop():
                self.is_broken = True
                return match.start()
            elif not self._open:
                self.is_closed = True
                return at
        return at
