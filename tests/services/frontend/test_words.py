"""Encoding by words, against the tokenizer itself."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from services.frontend import words
from services.frontend.words import WordEncoder, cuts_at_spaces
from tests.services.frontend.plain_tokenizers import encoded, settings_of

SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\x1c",
    "\x85",
]
PARTS = ["a", "B", "the", "the", "théâtre", "e\u0301", "\u0301", "1", "234", "½", ".", ";", "//"]
PARTS += ["'s", "'LL", "中文", "\u200d", "👩\u200d💻", "ǅ", "ʰ", "²", "_", "\u180e", "end.", "İ"]

texts = st.lists(
    st.sampled_from(SPACES)
    | st.sampled_from(PARTS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=25,
).map("".join)


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, *, normalizes: bool = False) -> Tokenizer:
    """A BPE tokenizer that has merged much of what its pre-tokenizer leaves together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizes:
        tokenizer.normalizer = normalizers.NFC()
    chooser = random.Random(0)
    corpus = ["".join(chooser.choices(SPACES + PARTS, k=40)) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(["<x>"])
    return tokenizer


def with_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": trained(BYTES),
    "digits": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
    ),
    "whole numbers": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES])
    ),
    **{
        f"pattern {number}": trained(with_pattern(pattern), normalizes=True)
        for number, pattern in enumerate(sorted(words.PATTERNS))
    },
}


SETTINGS = {name: settings_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    conversation=st.lists(texts, min_size=1, max_size=6),
    max_words=st.integers(0, 40),
    piece_characters=st.sampled_from([0, 3, words.PIECE_CHARACTERS]),
    short_text_characters=st.sampled_from([0, 10, words.SHORT_TEXT_CHARACTERS]),
)
def test_words_give_the_tokens_of_the_whole(
    name: str,
    conversation: list[str],
    max_words: int,
    piece_characters: int,
    short_text_characters: int,
) -> None:
    encoder = WordEncoder(TOKENIZERS[name], SETTINGS[name], max_words=max_words)
    assert cuts_at_spaces(SETTINGS[name])
    with (
        patch.object(words, "PIECE_CHARACTERS", piece_characters),
        patch.object(words, "SHORT_TEXT_CHARACTERS", short_text_characters),
    ):
        for text in conversation:
            assert encoder.encode(text).tolist() == encoded(TOKENIZERS[name], text)
            assert encoder.known_words <= max_words


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_of_known_and_of_unknown_words_do_too(name: str) -> None:
    chooser = random.Random(1)
    encoder = WordEncoder(TOKENIZERS[name], SETTINGS[name])
    for _ in range(3):
        known = "".join(chooser.choices(SPACES + PARTS, k=4000))
        strange = " ".join(f"{chooser.getrandbits(40):x}" for _ in range(2000))
        for text in (known, strange, known + strange):
            assert encoder.encode(text).tolist() == encoded(TOKENIZERS[name], text)


class CountingTokenizer:
    """Tells what it was asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
        self.encoded += texts
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def test_a_word_is_encoded_once() -> None:
    tokenizer = CountingTokenizer(TOKENIZERS["bytes"])
    encoder = WordEncoder(tokenizer, SETTINGS["bytes"])  # type: ignore[arg-type]
    with patch.object(words, "SHORT_TEXT_CHARACTERS", 0):
        encoder.encode("the end. the  end. of it")
        assert tokenizer.encoded == ["the", " end.", " the", "  end.", " of", " it"]
        tokenizer.encoded.clear()
        encoder.encode("of the end. of the new end.")
        assert tokenizer.encoded == ["of", " new"]


def test_a_short_text_is_encoded_as_it_is() -> None:
    tokenizer = CountingTokenizer(TOKENIZERS["bytes"])
    encoder = WordEncoder(tokenizer, SETTINGS["bytes"])  # type: ignore[arg-type]
    encoder.encode("the end. the  end. of it")
    assert tokenizer.encoded == ["the end. the  end. of it"]
    assert not encoder.known_words


def test_of_a_text_of_strange_words_some_are_remembered() -> None:
    tokenizer = CountingTokenizer(TOKENIZERS["bytes"])
    encoder = WordEncoder(tokenizer, SETTINGS["bytes"])  # type: ignore[arg-type]
    text = " ".join(map(str, range(10 * words.NEW_WORDS)))
    encoder.encode(text)
    assert tokenizer.encoded[-1] == text
    assert encoder.known_words == words.NEW_WORDS


def test_long_words_are_not_remembered() -> None:
    encoder = WordEncoder(TOKENIZERS["bytes"], SETTINGS["bytes"])
    for length in (words.MAX_WORD_CHARACTERS, words.MAX_WORD_CHARACTERS + 1):
        text = f"the {'x' * length} {'the ' * words.SHORT_TEXT_CHARACTERS}"
        assert encoder.encode(text).tolist() == encoded(TOKENIZERS["bytes"], text)
    assert encoder.known_words == 2


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Digits(),
        pre_tokenizers.Metaspace(),
        with_pattern(r"\p{L}+ \p{L}+"),
        pre_tokenizers.Sequence([BYTES, pre_tokenizers.Metaspace()]),
        pre_tokenizers.Split(Regex(min(words.PATTERNS)), behavior="removed"),
        pre_tokenizers.Split(Regex(min(words.PATTERNS)), behavior="isolated", invert=True),
    ],
)
def test_tokenizers_that_might_look_beyond_words_get_whole_texts(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> None:
    tokenizer = trained(pre_tokenizer)
    settings = settings_of(tokenizer)
    assert not cuts_at_spaces(settings)
    encoder = WordEncoder(tokenizer, settings)
    assert encoder.encode("the end of the end").tolist() == encoded(tokenizer, "the end of the end")
    assert not encoder.known_words


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<y>", lstrip=True),
        AddedToken("<y>", rstrip=True),
        AddedToken("<y>", single_word=True),
        AddedToken("the end", normalized=True),
    ],
)
def test_so_do_tokenizers_with_tokens_across_words(token: AddedToken) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["bytes"].to_str())
    tokenizer.add_tokens([token])
    assert not cuts_at_spaces(settings_of(tokenizer))


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Replace("d o", "x")])
def test_so_do_tokenizers_that_change_the_text(normalizer: normalizers.Normalizer) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["bytes"].to_str())
    tokenizer.normalizer = normalizer
    assert not cuts_at_spaces(settings_of(tokenizer))
    encoder = WordEncoder(tokenizer, settings_of(tokenizer))
    assert encoder.encode("end of").tolist() == encoded(tokenizer, "end of")


def test_a_tokenizer_without_steps_gets_whole_texts() -> None:
    assert not cuts_at_spaces(settings_of(Tokenizer(models.BPE())))


def test_tokenizers_from_before_there_was_a_choice_have_gpt_2s_pattern() -> None:
    settings = settings_of(TOKENIZERS["bytes"])
    del settings["pre_tokenizer"]["use_regex"]
    assert cuts_at_spaces(settings)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    ids=["Llama 3", "Qwen 2", "gpt-oss", "Mistral Nemo"],
)
def test_patterns_of_well_known_models_are_known(pattern: str) -> None:
    assert pattern in words.PATTERNS
