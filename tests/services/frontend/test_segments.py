"""Encoding by segments, against the tokenizer itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from services.frontend.segments import SegmentEncoder, borders_of
from tests.services.frontend.plain_tokenizers import encoded, settings_of

SPECIAL = ["<|im|>", "<|im|>x", "<|", "<|im|>xyz", "<|in", "[INST]"]
"""Some are the beginning of others."""


def _trained(
    *, pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    """A BPE tokenizer with merges across words, as far as its pre-tokenizer lets it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["user assistant im x | < > in st INST the théâtre"] * 4, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["user x"])  # Found in the normalised text, after the others.
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": _trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a space before": _trained(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "words, normalised": _trained(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    ),
    "prepended": _trained(
        pre_tokenizer=pre_tokenizers.Split("\u2581", "merged_with_next"),
        normalizer=normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        ),
    ),
    "first word unlike others": _trained(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
}

texts = st.lists(
    st.sampled_from(
        [*SPECIAL, " ", "\n", "user", "user x", "USER X", "assistant", "é", "in<|im|", "<|im|>xy"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)


SETTINGS = {name: settings_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(conversation=st.lists(texts, min_size=1, max_size=5), max_bytes=st.integers(0, 2000))
def test_segments_give_the_tokens_of_the_whole(
    name: str, conversation: list[str], max_bytes: int
) -> None:
    encoder = SegmentEncoder(TOKENIZERS[name], SETTINGS[name], max_bytes=max_bytes)
    for turns in range(1, len(conversation) + 1):
        text = "".join(conversation[:turns])
        assert encoder.encode(text) == encoded(TOKENIZERS[name], text)
        assert encoder.remembered_bytes <= max_bytes


def test_most_tokenizers_can_be_cut_at_their_special_tokens() -> None:
    assert set(borders_of(SETTINGS["bytes"])) == set(SPECIAL)
    assert not borders_of(SETTINGS["first word unlike others"])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_looks_around_is_no_border(flag: str) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["bytes"].to_str())
    tokenizer.add_special_tokens([AddedToken("<mask>", **{flag: True})])
    settings = settings_of(tokenizer)
    assert not borders_of(settings)
    assert SegmentEncoder(tokenizer, settings).encode("a <mask> b") == encoded(
        tokenizer, "a <mask> b"
    )


class CountingTokenizer:
    """Tells what it was asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Sequence[object]:
        self.encoded += texts
        encodings: Sequence[object] = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=add_special_tokens
        )
        return encodings


def test_what_was_encoded_is_not_encoded_again() -> None:
    tokenizer = CountingTokenizer(TOKENIZERS["bytes"])
    encoder = SegmentEncoder(tokenizer, SETTINGS["bytes"])  # type: ignore[arg-type]
    encoder.encode("<|im|>user in<|im|>assistant")
    tokenizer.encoded.clear()
    encoder.encode("<|im|>user in<|im|>assistant<|im|>the")
    assert tokenizer.encoded == ["the"]
