"""Text to tokens and back, with a model's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import orjson
from tokenizers import Tokenizer

from libs.common.errors import InvalidRequest
from services.frontend.chat_template import Chat, chat_template_of
from services.frontend.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    StreamDetokenizer,
    decodes_bytes,
)
from services.frontend.parsers.formats import detected
from services.frontend.segments import DEFAULT_BYTES, SegmentEncoder

_PROMPT_END_TOKENS = 32
"""Prompt tokens among which a mark at its end is found."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""What tokenizers with a fallback to bytes call the token of a byte."""


def byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as, GPT-2's: printable bytes of Latin-1 stand
    for themselves, the others for the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class ModelTokenizer:
    """Safe to use from several threads."""

    def __init__(self, files: Mapping[str, bytes], *, cache_bytes: int = DEFAULT_BYTES) -> None:
        """From the files of a model; texts with their tokens are remembered in so many bytes.

        Raises ValueError for files that can't be used.
        """
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
            settings = orjson.loads(files["tokenizer.json"])
            self._chat_template = chat_template_of(files)
            config = orjson.loads(files.get("tokenizer_config.json", b"{}"))
        except Exception as error:  # The tokenizers library raises nothing more specific.
            raise ValueError(f"unusable tokenizer files: {error!r}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._segments = SegmentEncoder(self._tokenizer, settings, max_bytes=cache_bytes)
        bos = config.get("bos_token")
        text = bos.get("content") if isinstance(bos, dict) else bos
        self._bos_id = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        self.truncation_side = "left" if config.get("truncation_side") == "left" else "right"
        """Where the model wants texts to be cut that are too long."""
        self.vocabulary_tokens: int = self._tokenizer.get_vocab_size()
        self._token_bytes: dict[int, bytes] = {}
        """As far as they were asked for."""
        self._bytes_of_letters = byte_letters()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: at for at, token in added.items() if token.special}
        self._all_special = frozenset(self._special_ids.values())
        self._decodes_bytes = decodes_bytes(settings)
        self._template_source = self._chat_template.source if self._chat_template else ""
        self.detected_format = detected(self._template_source, self._is_token)
        """How the model writes reasoning and tool calls, as far as its files tell."""

    def encode(self, text: str, *, adds_special_tokens: bool = True) -> list[int]:
        """Tokens of a plain prompt, by default with the special tokens that the model wants around
        one."""
        if not adds_special_tokens:
            return self._segments.encode(text)
        if not self._tokenizer.num_special_tokens_to_add(is_pair=False):
            return self._with_one_bos(self._segments.encode(text))
        # Unlike `encode` this lets go of Python's lock, so that a long text in a thread delays
        # nobody.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=True)
        return self._with_one_bos(encoding.ids)

    def _with_one_bos(self, token_ids: list[int]) -> list[int]:
        # A prompt that already starts with the token would otherwise have it twice.
        if self._bos_id is not None and token_ids[:2] == [self._bos_id, self._bos_id]:
            return token_ids[1:]
        return token_ids

    def encode_cut(
        self, text: str, most_tokens: int, side: str, *, adds_special_tokens: bool = True
    ) -> list[int]:
        """As `encode`, of as much of the text as fits into so many tokens. `side` is where the rest
        is cut off, `left` or `right`; special tokens stay, and may be more than that."""
        room_tokens = most_tokens
        if adds_special_tokens:
            room_tokens -= self._tokenizer.num_special_tokens_to_add(is_pair=False)
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        encoding.truncate(max(0, room_tokens), direction=side)
        whole = self._tokenizer.post_process(encoding, add_special_tokens=adds_special_tokens)
        return self._with_one_bos(whole.ids)

    def encode_chat(self, chat: Chat) -> list[int]:
        """Tokens of a conversation. The template writes the special tokens itself.

        Raises InvalidRequest when the model has no template or its template rejects the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "the model has no chat template; use completions", param="messages"
            )
        return self._segments.encode(self._chat_template.render(chat))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that are all known, special ones included."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls each token. Not text: a space may be a letter of its own."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for within a text; they need not be whole characters."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        # Behind another token, since decoders take away a space at the start of a text.
        before = self._neighbour
        text = self._tokenizer.decode([before, token_id], skip_special_tokens=False)
        text = text[len(self._tokenizer.decode([before], skip_special_tokens=False)) :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        try:
            return bytes([self._bytes_of_letters[letter] for letter in piece])
        except KeyError:  # Not of a tokenizer of bytes: its text is all there is.
            return text.encode()

    @cached_property
    def _neighbour(self) -> int:
        token_ids = self._segments.encode("a")
        return token_ids[-1] if token_ids else 0

    def template_has(self, *variables: str) -> bool:
        """Whether the chat template mentions one of these variables."""
        return any(variable in self._template_source for variable in variables)

    def end_of(self, prompt: Sequence[int]) -> str:
        """The text that a prompt ends with, special tokens included; long enough for a mark."""
        text: str = self._tokenizer.decode(
            list(prompt[-_PROMPT_END_TOKENS:]), skip_special_tokens=False
        )
        return text

    def detokenizer(
        self,
        prompt: Sequence[int],
        *,
        keeps_special_tokens: bool = False,
        marks: Sequence[str] = (),
    ) -> Detokenizer:
        """Text of what follows the prompt. Of special tokens only `marks` have one, unless all are
        kept."""
        dropped = self._all_special
        if keeps_special_tokens:
            dropped = frozenset()
        elif marks:
            dropped -= {self._special_ids[mark] for mark in marks if mark in self._special_ids}
        if self._decodes_bytes:
            return ByteDetokenizer(self.token_bytes, dropped)
        return StreamDetokenizer(self._tokenizer, prompt, dropped)

    def _is_token(self, text: str) -> bool:
        return self._tokenizer.token_to_id(text) is not None
