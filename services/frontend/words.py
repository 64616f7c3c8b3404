"""Encoding text by words: what stands between two spaces is encoded once and remembered.

A long text is mostly the same few thousand words, and to look them up takes a tenth of the time
that encoding them again does.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

DEFAULT_WORDS = 131_072
"""Remembered of one tokenizer, in some 20 MB; then it starts anew."""

SHORT_TEXT_CHARACTERS = 80
"""Shorter texts are encoded as they are: to look their words up, of which one is often new, takes
as long."""

MAX_WORD_CHARACTERS = 64
"""Longer ones are not remembered."""

NEW_WORDS, NEW_WORDS_SHARE = 256, 2
"""A text with more unknown ones than the first number, and one in the second of its words beside,
is encoded as a whole: a word by itself takes as long as some in a text. Of such a text only the
first number of words is remembered."""

PIECE_CHARACTERS = 16_384
"""Of longer texts so much is looked up at a time, and one text after the other: nobody else runs
meanwhile, and the event loop must not wait behind several threads for its turn."""

_CUT = re.compile(r" (?<=\S )")
"""A space behind something else: there a word ends, whatever follows."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_WORD, _SIGNS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _of_gpt_4(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_NOT_WORD}\p{{L}}+|{digits}|{_SIGNS}[\r\n]*|{_SPACES}"


def _of_gpt_4o(ending: str, digits: str) -> str:
    return (
        rf"{_NOT_WORD}{_UPPER}*{_LOWER}+{ending}|{_NOT_WORD}{_UPPER}+{_LOWER}*{ending}"
        rf"|{digits}|{_SIGNS}[\r\n/]*|{_SPACES}"
    )


PATTERNS = frozenset(
    {
        _of_gpt_4(r"\p{N}{1,3}"),  # Llama 3
        _of_gpt_4(r"\p{N}"),  # Qwen 2 and 3
        _of_gpt_4o(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),  # gpt-oss, Llama 4
        _of_gpt_4o("", r"\p{N}"),  # Mistral Nemo and later
    }
)
"""Of tokenizers in use, those whose matches have a space at their beginning or behind other space
only, and look no further than to the next character after space."""


class WordEncoder:
    """Gives the tokens that the tokenizer itself would give, without those that a model wants
    around a text. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], *, max_words: int = DEFAULT_WORDS
    ) -> None:
        """`settings` is what the tokenizer was made of, its tokenizer.json."""
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._has_words = cuts_at_spaces(settings)
        self._turn = threading.Lock()
        self._known: dict[str, bytes] = {}
        """Tokens, as in an array, of words and the space before them. Words end with no space.

        Nothing is ever taken out, so that who looks words up needs no lock; it is replaced."""

    @property
    def known_words(self) -> int:
        return len(self._known)

    def encode(self, text: str) -> array[int]:
        """The tokens of a text."""
        if not self._has_words or len(text) < SHORT_TEXT_CHARACTERS:
            return self._encoded([text])[0]
        known = self._known
        first, *rest = _CUT.split(text, maxsplit=1)
        with self._turn if len(text) > PIECE_CHARACTERS else nullcontext():
            looked_up = _LookedUp(rest, known)
        unknown = looked_up.unknown
        new = list(dict.fromkeys(unknown.values()))
        is_strange = len(new) > NEW_WORDS + looked_up.words // NEW_WORDS_SHARE
        if is_strange:
            del new[NEW_WORDS:]
        start, *encoded = self._encoded([first, *[f" {word}" for word in new]])
        tokens_of = dict(zip(new, map(array.tobytes, encoded), strict=True))
        self._remember(known, tokens_of)
        if is_strange:
            return self._encoded([text])[0]
        for place, word in unknown.items():
            looked_up.tokens[place] = tokens_of[word]
        start.frombytes(b"".join(looked_up.tokens))
        return start

    def _remember(self, known: dict[str, bytes], tokens_of: dict[str, bytes]) -> None:
        known.update(
            (word, tokens)
            for word, tokens in tokens_of.items()
            if _is_word(word) and len(word) <= MAX_WORD_CHARACTERS
        )
        if len(known) > self._max_words:
            self._known = {}

    def _encoded(self, texts: list[str]) -> list[array[int]]:
        # Unlike `encode` this lets go of Python's lock, so that a long text in a thread delays
        # nobody.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [array("I", encoding.ids) for encoding in encodings]


def cuts_at_spaces(settings: dict[str, Any]) -> bool:
    """Whether the tokenizer, by its tokenizer.json, cuts every text where _CUT does, and takes the
    parts as it would take them alone. False also where that is not certain."""
    for token in settings.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return False
        if token["normalized"] and any(map(str.isspace, token["content"])):
            return False
    if (settings.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return False
    pre_tokenizer = settings.get("pre_tokenizer") or {"type": "none"}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return all(map(_keeps_cuts, steps)) and any(map(_cuts, steps))


def _cuts(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":  # With GPT-2's pattern, to which the same applies.
            return bool(step.get("use_regex", True))
        case "Split":
            is_plain = step["behavior"] == "Isolated" and not step["invert"]
            return is_plain and step["pattern"].get("Regex") in PATTERNS
        case _:
            return False


def _keeps_cuts(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":
            return not step["add_prefix_space"]
        case "Digits":
            return True
        case _:
            return _cuts(step)


class _LookedUp:
    """What is known of the words behind the first one."""

    def __init__(self, rest: list[str], known: dict[str, bytes]) -> None:
        """`rest` is the text of them, or nothing."""
        self.words = 0
        self.tokens: list[bytes] = []
        """Of words, or of many together; empty for those that are unknown."""
        self.unknown: dict[int, str] = {}
        """By place in `tokens`."""
        for piece in chain.from_iterable(map(_pieces, rest)):
            words = piece.split(" ")
            try:
                # What is known is a word, so all spaces here are between words.
                self.tokens.append(b"".join(map(known.__getitem__, words)))
            except KeyError:
                if not all(map(_is_word, words[:-1])):
                    words = _CUT.split(piece)
                places = enumerate(words, len(self.tokens))
                self.unknown.update((place, word) for place, word in places if word not in known)
                self.tokens += [known.get(word, b"") for word in words]
            self.words += len(words)


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text between words."""
    start = 0
    while (cut := _CUT.search(text, start + PIECE_CHARACTERS)) is not None:
        yield text[start : cut.start()]
        start = cut.end()
    yield text[start:]


def _is_word(part: str) -> bool:
    """Whether a space behind this is between words."""
    return bool(part) and not part[-1].isspace()
