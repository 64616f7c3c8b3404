"""Encoding text by segments: what lies between special tokens is encoded once and remembered.

Templates repeat themselves (system prompts, roles), and a conversation comes back with every turn.
"""

from __future__ import annotations

import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import orjson
from tokenizers import Tokenizer

from services.frontend.words import WordEncoder

DEFAULT_BYTES = 64 << 20
"""Of all that is remembered of one tokenizer, about: texts and their tokens."""

_ENTRY_BYTES = 200
"""Of a segment, besides its text and tokens."""

BYTES_PER_WORD = 512
"""For so many of these bytes one word may be remembered besides, which takes about 160."""


class SegmentEncoder:
    """Gives the tokens that the tokenizer itself would give, without those that a model wants
    around a text. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], *, max_bytes: int = DEFAULT_BYTES
    ) -> None:
        """`settings` is what the tokenizer was made of, its tokenizer.json."""
        self._words = WordEncoder(tokenizer, settings, max_words=max_bytes // BYTES_PER_WORD)
        self._max_bytes = max_bytes
        self._borders = borders_of(settings)
        self._at_border = re.compile(f"({_longest_of(self._borders)})")
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self.remembered_bytes = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        if not self._borders:
            return self._words.encode(text).tolist()
        token_ids: list[int] = []
        for index, part in enumerate(self._at_border.split(text)):
            if index % 2:  # Borders are at odd places, segments between them.
                token_ids.append(self._borders[part])
            elif part:
                token_ids.extend(self._tokens_of(part))
        return token_ids

    def _tokens_of(self, segment: str) -> array[int]:
        with self._lock:
            if (found := self._known.get(segment)) is not None:
                self._known.move_to_end(segment)
                return found
        token_ids = self._words.encode(segment)
        self._remember(segment, token_ids)
        return token_ids

    def _remember(self, segment: str, token_ids: array[int]) -> None:
        size_bytes = _bytes_of(segment, token_ids)
        with self._lock:
            if size_bytes <= self._max_bytes and segment not in self._known:
                self._known[segment] = token_ids
                self.remembered_bytes += size_bytes
            while self.remembered_bytes > self._max_bytes:
                self.remembered_bytes -= _bytes_of(*self._known.popitem(last=False))


def borders_of(settings: dict[str, Any]) -> dict[str, int]:
    """Tokens at which a text can be cut, so that its parts encode to what the whole does; none for
    a tokenizer with which that is not certain.

    A tokenizer cuts a text at its added tokens before anything else, and does the rest within the
    parts. It does look beyond them for tokens that take in the space around them or are words of
    their own, and to tell what a text begins with.
    """
    added = [
        token
        for token in settings.get("added_tokens", ())
        if token["content"] and not token["normalized"]
    ]
    looks_around = any(
        token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word")
    )
    if looks_around or b'"prepend_scheme":"first"' in orjson.dumps(settings.get("pre_tokenizer")):
        return {}
    return {token["content"]: token["id"] for token in added}


def _longest_of(texts: Iterable[str]) -> str:
    """A pattern of these texts, of which it takes the longest, as tokenizers do.

    What several begin with is in it once: some models have thousands of added tokens, and to try
    one after the other wherever a text has a `<` would take milliseconds for each kilobyte.
    """
    texts = sorted(texts)
    if not texts:
        return ""
    # What the first and the last begin with, so do all between them.
    alike = (a == b for a, b in zip(texts[0], texts[-1], strict=False))
    shared = texts[0][: sum(takewhile(bool, alike))]
    by_next: dict[str, list[str]] = {}
    for text in texts:
        if rest := text[len(shared) :]:
            by_next.setdefault(rest[0], []).append(rest)
    if not by_next:
        return re.escape(shared)
    rests = "|".join(map(_longest_of, by_next.values()))
    return f"{re.escape(shared)}(?:{rests}){'?' if shared in texts else ''}"


def _bytes_of(segment: str, token_ids: array[int]) -> int:
    return sys.getsizeof(segment) + sys.getsizeof(token_ids) + _ENTRY_BYTES
