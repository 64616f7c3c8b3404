"""Text to tokens and back, through a real tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from libs.common.errors import InvalidRequest
from services.frontend.chat_template import Chat
from services.frontend.tokenizer import ModelTokenizer
from tests.services.frontend.byte_model import END_TOKEN, FILES, TOKENIZER, files, tokens

BYTE_TOKENS = 256


def _tokenizer_of_words() -> ModelTokenizer:
    pieces = [("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581", -2.0), ("b", -3.0), ("<0xC3>", -4.0)]
    pieces += [("<0xA9>", -4.0), ("a", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return ModelTokenizer({"tokenizer.json": tokenizer.to_str().encode()})


WORDS = _tokenizer_of_words()


def text_of(token_ids: list[int], prompt: list[int]) -> str:
    detokenizer = TOKENIZER.detokenizer(prompt)
    return "".join(detokenizer.add((token_id,)) for token_id in token_ids)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text("aé🎉"))
def test_text_survives_the_way_through_tokens(text: str, prompt: str) -> None:
    assert text_of(TOKENIZER.encode(text), TOKENIZER.encode(prompt)) == text


@given(st.text("aé🎉", min_size=1), st.lists(st.integers(0, BYTE_TOKENS - 1), max_size=12))
def test_half_a_character_never_comes_out(text: str, prompt: list[int]) -> None:
    detokenizer = TOKENIZER.detokenizer(prompt)
    detokenizer.add(tokens("x"))
    out = ""
    for token in TOKENIZER.encode(text):
        out += detokenizer.add((token,))
        assert text.startswith(out)


@given(st.lists(st.integers(0, BYTE_TOKENS + 2), max_size=16))
def test_any_tokens_give_the_beginning_of_what_they_decode_to_at_once(token_ids: list[int]) -> None:
    whole = Tokenizer.from_buffer(FILES["tokenizer.json"]).decode(token_ids)
    assert whole.startswith(text_of(token_ids, []))


def test_what_is_no_text_at_all_does_not_pile_up() -> None:
    continuation_byte = tokens("é")[1]
    text = text_of([continuation_byte] * 1000, [])
    assert 950 < len(text) <= 1000
    assert set(text) == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_have_no_text() -> None:
    assert text_of([*tokens("a"), END_TOKEN, *tokens("b")], []) == "ab"


def test_special_tokens_have_text_when_they_are_to_be_kept() -> None:
    detokenizer = TOKENIZER.detokenizer([], keeps_special_tokens=True)
    text = detokenizer.add([*tokens("é"), END_TOKEN, *tokens("b")])
    assert text == "é<|im_end|>b"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(text: str) -> None:
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text))) == text.encode()


def test_the_bytes_of_tokens_of_a_tokenizer_of_words_keep_their_spaces() -> None:
    assert [WORDS.token_bytes(token) for token in range(1, 5)] == [b" a", b" ", b"b", b"\xc3"]


@given(st.text("abé ", min_size=1), st.text("ab é"))
def test_text_of_words_goes_on_where_the_prompt_ends(text: str, prompt: str) -> None:
    prompt_ids, whole_ids = WORDS.encode(prompt), WORDS.encode(prompt + text)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        added = WORDS.detokenizer(prompt_ids).add(whole_ids[len(prompt_ids) :])
        assert WORDS.decode(prompt_ids) + added == WORDS.decode(whole_ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WORDS], ids=["bytes", "words"])
@given(st.lists(st.lists(st.integers(0, 5), max_size=4)))
def test_tokens_that_come_together_have_the_text_that_they_have_one_by_one(
    tokenizer: ModelTokenizer, steps: list[list[int]]
) -> None:
    together, alone = tokenizer.detokenizer([]), tokenizer.detokenizer([])
    for step in steps:
        assert together.add(step) == "".join(alone.add((token_id,)) for token_id in step)


def test_chat_goes_through_the_models_own_template() -> None:
    chat = Chat([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hé"}])
    expected = (
        "<|bos|><|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHé<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TOKENIZER.encode_chat(chat) == TOKENIZER.encode(expected)


def test_a_start_token_is_not_doubled() -> None:
    assert TOKENIZER.encode("<|bos|><|bos|>a") == TOKENIZER.encode("<|bos|>a")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_rejects_the_messages_is_the_callers_error(
    template: str, problem: str
) -> None:
    tokenizer = ModelTokenizer(files(template))
    with pytest.raises(InvalidRequest, match=problem) as raised:
        tokenizer.encode_chat(Chat([{"role": "user", "content": "Hi"}]))
    assert raised.value.param == "messages"


def test_the_template_can_be_a_file_or_a_list_of_named_ones() -> None:
    named = '[{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]'
    config = b'{"chat_template": %b}' % named.encode()
    hi = Chat([{"role": "user", "content": "Hi"}])
    listed = FILES | {"tokenizer_config.json": config}
    assert ModelTokenizer(listed).encode_chat(hi) == tokens("D")
    in_file = listed | {"chat_template.jinja": b"F"}
    assert ModelTokenizer(in_file).encode_chat(hi) == tokens("F")


def test_a_template_for_tools_is_used_when_there_are_tools() -> None:
    named = (
        '[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools }}"}]'
    )
    tokenizer = ModelTokenizer(
        FILES | {"tokenizer_config.json": b'{"chat_template": %b}' % named.encode()}
    )
    hi = [{"role": "user", "content": "Hi"}]
    assert tokenizer.encode_chat(Chat(hi)) == tokens("D")
    assert tokenizer.encode_chat(Chat(hi, tools=[{"a": 1}])) == tokens("T[{'a': 1}]")
    assert tokenizer.template_has("tools")


def test_variables_can_not_replace_special_tokens() -> None:
    tokenizer = ModelTokenizer(files("{{ bos_token }}{{ mood }}"))
    chat = Chat([], variables={"bos_token": "x", "mood": "y"})
    assert tokenizer.encode_chat(chat) == TOKENIZER.encode("<|bos|>y")


def test_a_template_that_writes_the_start_token_has_it_once() -> None:
    tokenizer = Tokenizer.from_buffer(FILES["tokenizer.json"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokens("<|bos|>")[0])]
    )
    adding = ModelTokenizer(FILES | {"tokenizer.json": tokenizer.to_str().encode()})
    hi = Chat([{"role": "user", "content": "Hi"}])
    assert adding.encode("a") == tokens("<|bos|>a")
    assert adding.encode_chat(hi) == TOKENIZER.encode_chat(hi)


def test_of_special_tokens_only_marks_have_a_text() -> None:
    text = "<|im_start|>a<|im_end|>b<|bos|>"
    detokenizer = TOKENIZER.detokenizer(tokens("x"), marks=["<|im_start|>", "no token"])
    assert detokenizer.add(tokens(text)) == "<|im_start|>ab"


def test_unusable_files_are_refused() -> None:
    with pytest.raises(ValueError, match="unusable tokenizer files"):
        ModelTokenizer({"tokenizer.json": b"{}"})


def framed() -> ModelTokenizer:
    """Puts <|bos|> before a text and <|im_end|> behind it."""
    tokenizer = Tokenizer.from_buffer(FILES["tokenizer.json"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|im_end|>",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in ("<|bos|>", "<|im_end|>")],
    )
    return ModelTokenizer({**FILES, "tokenizer.json": tokenizer.to_str().encode()})


@given(st.text("abcé"), st.integers(2, 12), st.sampled_from(["left", "right"]), st.booleans())
def test_a_cut_text_keeps_its_special_tokens(text: str, most: int, side: str, adds: bool) -> None:
    tokenizer = framed()
    plain = tokens(text)
    room = most - 2 * adds
    kept = plain[max(0, len(plain) - room) :] if side == "left" else plain[:room]
    expected = [*tokens("<|bos|>"), *kept, END_TOKEN] if adds else kept
    cut = tokenizer.encode_cut(text, most, side, adds_special_tokens=adds)
    assert cut == expected
    if len(plain) <= room:
        assert cut == tokenizer.encode(text, adds_special_tokens=adds)
