"""What holds for every format, however a text is cut and whatever is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.frontend.parsers.formats import NONE, Parsing
from services.frontend.parsers.sections import DEEPSEEK_V3, KIMI_K2, SectionFormat
from tests.services.frontend.parsers.reading import (
    TOOL_NAMES,
    Answer,
    parsing,
    read,
    read_by_character,
)

LOST = "☃"
"""Put where it does not belong, to see whether it gets lost."""

PARSINGS = {
    "hermes": parsing("hermes"),
    "hermes+qwen3": parsing("hermes", "qwen3"),
    "hermes+deepseek_r1": parsing("hermes", "deepseek_r1"),
    "llama3_json": parsing("llama3_json"),
    "mistral": parsing("mistral"),
    "mistral+mistral": parsing("mistral", "mistral"),
    "gpt_oss": parsing("gpt_oss", "gpt_oss"),
    "kimi_k2": parsing("kimi_k2"),
    "deepseek_v3": parsing("deepseek_v3"),
    "deepseek_v3+deepseek_r1": parsing("deepseek_v3", "deepseek_r1"),
    "qwen3_coder": parsing("qwen3_coder"),
    "qwen3_coder+qwen3": parsing("qwen3_coder", "qwen3"),
    "glm45": parsing("glm45"),
    "glm45+qwen3": parsing("glm45", "qwen3"),
    "named": parsing(forced="get_weather"),
    "required": parsing(required=True),
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(['{"a": [}', "</tool_call>", 'quo"te\\', "日本 🎉", "</think>", "; {"]),
)
arguments = st.dictionaries(
    st.text("ab{}\"'é", min_size=1, max_size=4),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=2), max_leaves=4),
    max_size=3,
)
words = st.text("abc é🎉.{}[]\"'\n", max_size=12)


@dataclass
class Meant:
    """An answer that a model means to give."""

    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, object]]]


@st.composite
def meant(draw: st.DrawFn) -> Meant:
    names = st.sampled_from(sorted(TOOL_NAMES))
    return Meant(
        reasoning=draw(words).strip(),
        content=draw(words).strip(),
        calls=draw(st.lists(st.tuples(names, arguments), max_size=3)),
    )


def as_json(value: object, indent: int | None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def written(format_name: str, answer: Meant, indent: int | None) -> str:
    """The answer as a model of that format writes it."""
    calls = [(name, as_json(given, indent)) for name, given in answer.calls]
    match format_name:
        case "hermes" | "hermes+qwen3" | "hermes+deepseek_r1":
            think = {
                "hermes": "",
                "hermes+qwen3": f"<think>\n{answer.reasoning}\n</think>\n\n",
                "hermes+deepseek_r1": f"{answer.reasoning}\n</think>\n\n",
            }[format_name]
            return think + "\n".join(
                [
                    answer.content,
                    *(
                        f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>'
                        for name, given in calls
                    ),
                ]
            )
        case "llama3_json":
            if not calls:
                return answer.content
            return "; ".join(
                f'{{"name": "{name}", "parameters": {given}}}' for name, given in calls
            )
        case "mistral+mistral":
            text = f"[THINK]{answer.reasoning}[/THINK]{answer.content}"
            return text + "".join(f"[TOOL_CALLS]{name}[ARGS]{given}" for name, given in calls)
        case "mistral":
            listed = ", ".join(
                f'{{"name": "{name}", "arguments": {given}}}' for name, given in calls
            )
            return answer.content + (f"[TOOL_CALLS][{listed}]" if calls else "")
        case "gpt_oss":
            messages = [f"<|channel|>analysis<|message|>{answer.reasoning}"]
            messages += [
                f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{given}"
                for name, given in calls
            ]
            messages.append(f"<|channel|>final<|message|>{answer.content}<|return|>")
            return "<|end|><|start|>assistant".join(messages)
        case "kimi_k2":
            kimi = [kimi_call(*call, number) for number, call in enumerate(calls)]
            return answer.content + in_section(KIMI_K2, kimi)
        case "deepseek_v3" | "deepseek_v3+deepseek_r1":
            think = f"{answer.reasoning}\n</think>\n\n" if "+" in format_name else ""
            deepseek = [deepseek_call(*call, is_later=indent is None) for call in calls]
            return think + answer.content + in_section(DEEPSEEK_V3, deepseek)
        case "qwen3_coder" | "qwen3_coder+qwen3" | "glm45" | "glm45+qwen3":
            think = f"<think>\n{answer.reasoning}\n</think>\n\n" if "+" in format_name else ""
            write = qwen_call if "qwen3_coder" in format_name else glm_call
            return think + "\n".join(
                [answer.content, *(write(name, given, indent) for name, given in answer.calls)]
            )
        case "named":
            return calls[0][1] if calls else answer.content
        case "required":
            listed = ", ".join(
                f'{{"name": "{name}", "parameters": {given}}}' for name, given in calls
            )
            return f"[{listed}]" if calls else answer.content
        case _:
            raise AssertionError(format_name)


def as_text(value: object, indent: int | None) -> str:
    """A value as the formats without JSON write it."""
    return value if isinstance(value, str) else as_json(value, indent)


def qwen_call(name: str, given: dict[str, object], indent: int | None) -> str:
    parameters = [
        f"<parameter={key}>\n{as_text(value, indent)}\n</parameter>\n"
        for key, value in given.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def glm_call(name: str, given: dict[str, object], indent: int | None) -> str:
    parameters = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{as_text(value, indent)}</arg_value>\n"
        for key, value in given.items()
    ]
    return f"<tool_call>{name}\n{''.join(parameters)}</tool_call>"


def in_section(marks: SectionFormat, calls: list[str]) -> str:
    return marks.section + "\n".join(calls) + marks.section_end if calls else ""


def kimi_call(name: str, given: str, number: int) -> str:
    begin = f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>"
    return f"{begin}{given}<|tool_call_end|>"


def deepseek_call(name: str, given: str, *, is_later: bool = False) -> str:
    """As V3 writes it, or as V3.1 does."""
    if is_later:
        return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{given}<｜tool▁call▁end｜>"
    begin = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
    return f"{begin}{given}\n```<｜tool▁call▁end｜>"


def parsing_of(format_name: str, answer: Meant) -> Parsing:
    """How answers of a format are read, with the schemas that the calls' arguments have."""
    how = PARSINGS[format_name]
    if how.format.tools not in ("qwen3_coder", "glm45"):
        return how
    # Schemas are of tools, not of calls: one of each tool.
    answer.calls = list({name: (name, given) for name, given in answer.calls}.values())
    if how.format.tools == "glm45":
        assume("</tool_call>" not in str(answer.calls))
    schemas = {
        name: {"properties": {key: {"type": type_of(value)} for key, value in given.items()}}
        for name, given in answer.calls
    }
    return replace(how, tool_schemas=schemas)


def type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", str: "string", list: "array", type(None): "null"}
    return names[type(value)]


formats = st.sampled_from(sorted(PARSINGS))
cuts = st.lists(st.integers(0, 1000), max_size=12)
indents = st.sampled_from([None, 2])


@settings(max_examples=200, deadline=None)
@given(formats, meant(), indents, cuts)
def test_what_a_model_means_arrives_however_it_is_cut(
    format_name: str, answer: Meant, indent: int | None, where: list[int]
) -> None:
    assume(answer.calls or format_name not in ("named", "required"))
    how = parsing_of(format_name, answer)
    text = written(format_name, answer, indent)
    found = read(how, text, where)
    calls = [(name, json.loads(given)) for name, given in found.calls]
    if format_name == "named":
        assert calls == [("get_weather", given) for _, given in answer.calls[:1]]
    else:
        assert calls == answer.calls
    # Some formats have no place for reasoning, or for content beside calls.
    if "+" in format_name or format_name == "gpt_oss":
        assert found.reasoning.strip() == answer.reasoning
    if not answer.calls or format_name not in ("llama3_json", "named", "required"):
        assert found.content.strip() == answer.content


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, str]:
    """A format and a transcript of it in which something is wrong."""
    format_name = draw(formats)
    text = written(format_name, draw(meant()), draw(indents))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["cut", "drop", "double", "insert", "end"])):
            case "cut":
                text = text[begin:]
            case "end":
                text = text[:begin]
            case "drop":
                text = text[:begin] + text[begin + draw(st.integers(1, 6)) :]
            case "double":
                end = min(len(text), begin + draw(st.integers(1, 40)))
                text = text[:end] + text[begin:]
            case "insert":
                mark = draw(st.sampled_from(MARKS))
                text = text[:begin] + mark + text[begin:]
    return format_name, text


MARKS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[THINK]",
    "[/THINK]", "<|python_tag|>", "<|channel|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>",
    '{"name": "get_weather", "arguments": ', '{"type": 1, ', '"arguments": 5, ',
    *KIMI_K2.marks, *DEEPSEEK_V3.marks, "functions.get_time:0", "```",
    "<function=", "<function=get_weather>", "<parameter=", "<parameter=a>", "</parameter>",
    "</function>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "{", "}", "[", "]", '"', "\\", ";", ",", "\n", " ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(spoilt(), cuts, st.sampled_from(["", "<think>\n"]))
def test_streamed_and_whole_answers_agree_whatever_is_wrong(
    transcript: tuple[str, str], where: list[int], prompt_end: str
) -> None:
    format_name, text = transcript
    how = PARSINGS[format_name]
    whole = read(how, text, (), prompt_end)
    assert read(how, text, where, prompt_end) == whole
    assert read_by_character(how, text, prompt_end) == whole


@settings(max_examples=300, deadline=None)
@given(spoilt(), st.integers(0, 1000), cuts)
def test_no_text_is_lost_whatever_is_wrong(
    transcript: tuple[str, str], at: int, where: list[int]
) -> None:
    format_name, text = transcript
    at %= len(text) + 1
    text = text[:at] + LOST + text[at:]
    assert LOST in read(PARSINGS[format_name], text, where).text


@settings(max_examples=300, deadline=None)
@given(spoilt(), cuts)
def test_without_a_call_the_content_is_the_text(
    transcript: tuple[str, str], where: list[int]
) -> None:
    format_name, text = transcript
    assume(PARSINGS[format_name].format.reasoning == NONE)
    answer = read(PARSINGS[format_name], text, where)
    assert answer.calls or answer.content == text


@pytest.mark.parametrize("how", PARSINGS.values(), ids=PARSINGS)
@pytest.mark.parametrize("text", ["", " \n", "Just text.", "Two\n\nlines {x}", "`code` [1]"])
def test_an_answer_without_marks_is_content_as_it_is(how: Parsing, text: str) -> None:
    reads_all_as_reasoning = how.format.reasoning == "deepseek_r1"
    answer = read_by_character(how, text)
    if not reads_all_as_reasoning:
        assert answer == Answer(content=text)
    assert answer.text.strip() == text.strip()
