"""Text to tokens and back, with a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from libs.common.errors import InvalidRequest
from services.frontend.chat_template import Chat, chat_template_of

_PROMPT_TAIL_TOKENS = 8
"""Prompt tokens that the text of the first output token may depend on, such as for its space."""

_MOST_SILENT_TOKENS = 16
"""A character has at most 4 bytes, so more tokens than this without text are not half of one."""


class ModelTokenizer:
    """Safe to use from several threads."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """From the files of a model. Raises ValueError for files that can't be used."""
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
            self._chat_template = chat_template_of(files)
            config = orjson.loads(files.get("tokenizer_config.json", b"{}"))
        except Exception as error:  # The tokenizers library raises nothing more specific.
            raise ValueError(f"unusable tokenizer files: {error!r}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        bos = config.get("bos_token")
        text = bos.get("content") if isinstance(bos, dict) else bos
        self._bos_id = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        self.vocabulary_tokens: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the model wants around one."""
        token_ids = self._encode(text, add_special_tokens=True)
        # A prompt that already starts with the token would otherwise have it twice.
        if self._bos_id is not None and token_ids[:2] == [self._bos_id, self._bos_id]:
            return token_ids[1:]
        return token_ids

    def encode_chat(self, chat: Chat) -> list[int]:
        """Tokens of a conversation. The template writes the special tokens itself.

        Raises InvalidRequest when the model has no template or its template rejects the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "the model has no chat template; use completions", param="messages"
            )
        return self._encode(self._chat_template.render(chat), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Unlike `encode` this lets go of Python's lock, so that a long text in a thread delays
        # nobody.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        token_ids: list[int] = encoding.ids
        return token_ids

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """Text of what follows the prompt."""
        return Detokenizer(self._tokenizer, prompt)


class Detokenizer:
    """Text of tokens as they come, in whole characters; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        tail = list(prompt[-_PROMPT_TAIL_TOKENS:])
        # A tail that ends within a character would come out again as output.
        if tokenizer.decode(tail).endswith("\N{REPLACEMENT CHARACTER}"):
            tail = []
        self._stream = DecodeStream(ids=tail, skip_special_tokens=True)
        self._silent: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that the token completes; empty within a character.

        What is no text at all comes out as replacement characters. Half a character at the very
        end never comes out.
        """
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
        self._stream = DecodeStream(skip_special_tokens=True)
        text: str = self._tokenizer.decode(self._silent)
        return text
