"""Tokens to text as they come, in whole characters."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_PROMPT_TAIL_TOKENS = 8
"""Prompt tokens that the text of the first output token may depend on, such as for its space."""

_MOST_SILENT_TOKENS = 16
"""A character has at most 4 bytes, so more tokens than this without text are not half of one."""


class Detokenizer(ABC):
    """The text of one output."""

    @abstractmethod
    def add(self, token_ids: Sequence[int]) -> str:
        """The text that the tokens complete; empty within a character.

        What is no text at all comes out as replacement characters. Half a character at the very
        end never comes out.
        """


class ByteDetokenizer(Detokenizer):
    """For tokenizers whose tokens stand for bytes wherever they are."""

    def __init__(self, bytes_of: Callable[[int], bytes], dropped: Set[int]) -> None:
        """`dropped` tokens have no text."""
        self._bytes_of = bytes_of
        self._dropped = dropped
        self._rest = b""
        """Of a character that is not complete."""

    def add(self, token_ids: Sequence[int]) -> str:
        bytes_of, dropped = self._bytes_of, self._dropped
        data = self._rest + b"".join(
            [bytes_of(token_id) for token_id in token_ids if token_id not in dropped]
        )
        text, decoded_bytes = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[decoded_bytes:]
        return text


class StreamDetokenizer(Detokenizer):
    """For any tokenizer, also one whose tokens mean something else at the start of a text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], dropped: Set[int]) -> None:
        """`dropped` tokens have no text."""
        self._tokenizer = tokenizer
        self._dropped = dropped
        tail = [token_id for token_id in prompt[-_PROMPT_TAIL_TOKENS:] if token_id not in dropped]
        # A tail that ends within a character would come out again as output.
        if self._decode(tail).endswith("\N{REPLACEMENT CHARACTER}"):
            tail = []
        self._stream = DecodeStream(ids=tail, skip_special_tokens=False)
        self._silent: list[int] = []

    def add(self, token_ids: Sequence[int]) -> str:
        return "".join(
            [self._text(token_id) for token_id in token_ids if token_id not in self._dropped]
        )

    def _text(self, token_id: int) -> str:
        self._silent.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:  # "Invalid prefix", which has no type of its own.
            # The tokens decode to something else beside each other than one by one.
            text = self._restart()
        if text is None and len(self._silent) > _MOST_SILENT_TOKENS:
            # Each step decodes the silent tokens again, so their number must stay small.
            text = self._restart()
        if text is None:
            return ""
        self._silent.clear()
        return text

    def _restart(self) -> str:
        self._stream = DecodeStream(skip_special_tokens=False)
        return self._decode(self._silent)

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


def decodes_bytes(settings: dict[str, Any]) -> bool:
    """Whether the bytes of a text are those of its tokens, one after the other, by what is in
    tokenizer.json. It is so with byte-level BPE: GPT-2's and most others since."""
    decoder = settings.get("decoder")
    return decoder is not None and decoder["type"] == "ByteLevel"
