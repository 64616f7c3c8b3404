"""Tool calls in JSON, read as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import regex

from services.frontend.parsers.events import Output
from services.frontend.parsers.json_end import JsonEnd

MAX_NAME_CHARACTERS = 256

# Everything before a call's arguments is matched anew with each piece, so its length is bounded.
_GAP = r"\s{0,64}"
_HEADER = regex.compile(
    rf'{_GAP}\{{{_GAP}(?:"type"{_GAP}:{_GAP}"function"{_GAP},{_GAP})?'
    rf'"name"{_GAP}:{_GAP}("(?:[^"\\\n]|\\.){{1,{MAX_NAME_CHARACTERS}}}"){_GAP},{_GAP}'
    rf'"(?:arguments|parameters)"{_GAP}:{_GAP}(\{{){_GAP}["}}]'
)
_FIRST_KEY = regex.compile(rf'{_GAP}\{{{_GAP}"(?:name|arguments|parameters|type|id)"')
_TAIL = regex.compile(
    rf'{_GAP}(?:,{_GAP}"(?:id|type)"{_GAP}:{_GAP}"[^"\\]{{0,256}}"{_GAP}){{0,2}}\}}'
)
_ARRAY_BEGIN = regex.compile(rf"{_GAP}\[")
_ARRAY_NEXT = regex.compile(rf"{_GAP}([,\]])")

_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})


class CallReader(Protocol):
    """Reads one piece of the format that holds calls, up to its end."""

    @property
    def is_call(self) -> bool:
        """A call was let out. Until then nothing is."""

    @property
    def is_broken(self) -> bool:
        """The arguments stopped being JSON; the rest of the call follows."""

    @property
    def refused(self) -> str:
        """Text that was read and turned out to be no part of a call."""

    def feed(self, text: str) -> str | None:
        """Takes more text. None while more is wanted, else what follows."""

    def finish(self) -> str:
        """Text that is held back and will not become part of a call. Nothing follows."""


class Arguments:
    """The arguments of a call that is known to be one: a JSON object."""

    is_call = True
    refused = ""

    def __init__(self, output: Output) -> None:
        self.is_broken = False
        self._output = output
        self._end = JsonEnd()

    def feed(self, text: str) -> str | None:
        stop = self._end.feed(text)
        self._output.arguments(text[:stop])
        self.is_broken = self._end.is_broken
        return text[stop:] if self._end.is_closed or self.is_broken else None

    def finish(self) -> str:
        return ""


class JsonCall:
    """One call as an object: {"name": ..., "arguments": {...}}, or with "parameters".

    Where the name comes first, as models are taught to write it, arguments go out as they come.
    Any other order or form is read to its end and then judged.
    """

    def __init__(
        self, output: Output, *, accepts: Callable[[str], bool], needs_arguments: bool
    ) -> None:
        """`accepts` tells whether there may be a call of that name."""
        self.is_call = False
        self.refused = ""
        self._output = output
        self._accepts = accepts
        self._needs_arguments = needs_arguments
        self._held = ""
        self._step = self._read_header
        self._arguments: Arguments | None = None
        self._object_end: JsonEnd | None = None
        self._scanned = 0

    @property
    def is_broken(self) -> bool:
        return self._arguments is not None and self._arguments.is_broken

    def feed(self, text: str) -> str | None:
        self._held += text
        return self._step()

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _read_header(self) -> str | None:
        match = _HEADER.match(self._held, partial=True)
        if match is None:
            self._step = self._read_object
            return self._read_object()
        if match.partial:
            return None
        name = _json_or_none(match.group(1))
        if not isinstance(name, str) or not self._accepts(name):
            return self.finish()
        self._begin(name)
        self._arguments = Arguments(self._output)
        self._step = self._read_arguments
        self._held = self._held[match.start(2) :]
        return self._read_arguments()

    def _read_arguments(self) -> str | None:
        assert self._arguments is not None
        rest = self._arguments.feed(self.finish())
        if rest is None or self.is_broken:
            return rest
        self._held = rest
        self._step = self._read_tail
        return self._read_tail()

    def _read_tail(self) -> str | None:
        match = _TAIL.match(self._held, partial=True)
        if match is not None and match.partial:
            return None
        return self.finish()[match.end() if match else 0 :]

    def _read_object(self) -> str | None:
        if self._object_end is None:
            match = _FIRST_KEY.match(self._held, partial=True)
            if match is None:
                return self.finish()
            if match.partial:
                return None
            self._object_end = JsonEnd()
            self._scanned = self._held.index("{")
        self._scanned = self._object_end.feed(self._held, self._scanned)
        if not self._object_end.is_closed and not self._object_end.is_broken:
            return None
        held = self.finish()
        read, rest = held[: self._scanned], held[self._scanned :]
        call = self._judged(read) if self._object_end.is_closed else None
        if call is None:
            self.refused = read
        else:
            name, arguments = call
            self._begin(name)
            self._output.arguments(arguments)
        return rest

    def _judged(self, text: str) -> tuple[str, str] | None:
        """Name and arguments, if the object is a call."""
        fields = _json_or_none(text)
        if not isinstance(fields, dict) or not fields.keys() <= _KEYS:
            return None
        name = fields.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS:
            return None
        if not self._accepts(name) or fields.get("type", "function") != "function":
            return None
        given = [fields[key] for key in ("arguments", "parameters") if key in fields]
        if len(given) > 1 or (self._needs_arguments and not given):
            return None
        match given:
            case [dict() as arguments]:
                return name, json.dumps(arguments, ensure_ascii=False)
            case [str() as arguments] if isinstance(_json_or_none(arguments), dict):
                return name, arguments
            case [] | [None]:
                return name, "{}"
            case _:
                return None

    def _begin(self, name: str) -> None:
        self.is_call = True
        self._output.call(name)


class CallArray:
    """Calls in an array: [{"name": ..., "arguments": {...}}, ...]."""

    def __init__(self, output: Output, *, accepts: Callable[[str], bool]) -> None:
        self.is_call = False
        self.is_broken = False
        self.refused = ""
        self._output = output
        self._accepts = accepts
        self._held = ""
        self._separator = ""
        self._item: JsonCall | None = None

    def feed(self, text: str) -> str | None:
        self._held += text
        while True:
            if self._item is None and not self._begin_item():
                return None
            if self._item is None:
                held, self._held = self._held, ""
                return held
            held, self._held = self._held, ""
            rest = self._item.feed(held)
            if rest is None:
                return None
            if not self._item.is_call:
                self.refused = self._separator + self._item.refused
                return rest
            self.is_call = True
            self.is_broken = self._item.is_broken
            if self.is_broken:
                return rest
            self._held, self._item = rest, None

    def finish(self) -> str:
        held, self._held = self._held, ""
        if self._item is None:
            return held
        return self._item.finish() if self._item.is_call else self._separator + self._item.finish()

    def _begin_item(self) -> bool:
        """Reads what is before an item, or the end. False while more is wanted."""
        pattern = _ARRAY_NEXT if self.is_call else _ARRAY_BEGIN
        match = pattern.match(self._held, partial=True)
        if match is None:
            return True
        if match.partial:
            return False
        self._separator, self._held = self._held[: match.end()], self._held[match.end() :]
        if not self._separator.endswith("]"):
            self._item = JsonCall(self._output, accepts=self._accepts, needs_arguments=False)
        return True


def _json_or_none(text: str) -> Any:
    """The value; None as well for what is no JSON, is nested deeper than Python's parser goes, or
    has half a character, which no answer can carry."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
