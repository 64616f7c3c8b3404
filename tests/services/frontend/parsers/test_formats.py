"""Each format in its documented style, well written and not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import (  # type: ignore[import-untyped]
    HarmonyEncoding,
    HarmonyEncodingName,
    Role,
    StreamableParser,
    TextContent,
    load_harmony_encoding,
)

from services.frontend.parsers.events import CallArguments, CallStart
from services.frontend.parsers.formats import ModelFormat, chosen, detected
from services.frontend.parsers.harmony import MARKS
from tests.services.frontend.parsers.reading import Answer, parsing, read_by_character

HERMES = [
    (
        '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>',
        Answer(calls=[("get_time", '{"zone": "UTC"}')]),
    ),
    (  # Text around, and two calls without a line between them.
        'Sure.\n\n<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b", '
        '"arguments": {"x": [1, {"y": "}"}]}}</tool_call>\nDone.',
        Answer(content="Sure.\nDone.", calls=[("a", "{}"), ("b", '{"x": [1, {"y": "}"}]}')]),
    ),
    (  # Arguments before the name, as Hermes 2's template writes them.
        '<tool_call>\n{ "arguments": {"zone": "UTC"}, "name": "get_time"}\n</tool_call> ',
        Answer(calls=[("get_time", '{"zone": "UTC"}')]),
    ),
    (  # Arguments as a text.
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>',
        Answer(calls=[("f", '{"a": "é"}')]),
    ),
    ('<tool_call>{"name": "f"}</tool_call>', Answer(calls=[("f", "{}")])),
    (  # The end mark within a string is no end mark.
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        Answer(calls=[("f", '{"a": "</tool_call>"}')]),
    ),
    (  # A bracket too few: the call is what there is of it.
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        Answer(calls=[("f", '{"a": 1}')]),
    ),
    (  # Broken within the arguments: the rest up to the end mark stays with them.
        """<tool_call>{"name": "f", "arguments": {"a": 'x'}}</tool_call> Oh.""",
        Answer(content=" Oh.", calls=[("f", """{"a": 'x'}}""")]),
    ),
    (  # Cut off.
        '<tool_call>{"name": "f", "arguments": {"a": "b',
        Answer(calls=[("f", '{"a": "b')]),
    ),
    ('Hm <tool_call>{"name": "f", "argu', Answer("", 'Hm <tool_call>{"name": "f", "argu')),
    ("<tool_call>get_time()</tool_call>", Answer("", "<tool_call>get_time()</tool_call>")),
    (  # Half a surrogate pair can't be written into an answer.
        '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
        Answer("", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
    ),
]

LLAMA = [
    (
        '{"name": "get_time", "parameters": {"zone": "UTC"}}',
        Answer(calls=[("get_time", '{"zone": "UTC"}')]),
    ),
    (
        '<|python_tag|>{"type": "function", "name": "any_name", "parameters": {}}',
        Answer(calls=[("any_name", "{}")]),
    ),
    (
        '{"name": "get_time", "arguments": {}}; {"name": "get_weather", "parameters": {"a": 1}}',
        Answer(calls=[("get_time", "{}"), ("get_weather", '{"a": 1}')]),
    ),
    # JSON that is no call: of no tool's name, or without arguments.
    ('{"name": "Bob", "parameters": {}}', Answer("", '{"name": "Bob", "parameters": {}}')),
    ('{"name": "get_time"}', Answer("", '{"name": "get_time"}')),
    ('{"a": {"b": 1}}\n', Answer("", '{"a": {"b": 1}}\n')),
    ("<|python_tag|>print(1)", Answer("", "<|python_tag|>print(1)")),
    ("Say <|python_tag|> twice", Answer("", "Say <|python_tag|> twice")),
]

MISTRAL = [
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, '
        '"id": "abcdefghi"}]',
        Answer(calls=[("f", '{"a": 1}'), ("g", "{}")]),
    ),
    (
        'Yes.[TOOL_CALLS]f{"a": "["}[TOOL_CALLS]g{}',
        Answer(content="Yes.", calls=[("f", '{"a": "["}'), ("g", "{}")]),
    ),
    ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', Answer(calls=[("f", '{"a": 1}')])),
    ("[TOOL_CALLS]what?", Answer("", "[TOOL_CALLS]what?")),
    ("[TOOL_CALLS][1]", Answer("", "[TOOL_CALLS][1]")),
    (
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, 5]',
        Answer(content=", 5]", calls=[("f", "{}")]),
    ),
]


QWEN3_CODER = [
    (
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        Answer(content="I look.", calls=[("get_weather", '{"city": "Oslo", "days": 3}')]),
    ),
    (  # Without parameters, and two calls.
        "<tool_call>\n<function=a>\n</function>\n</tool_call>\n<tool_call>\n<function=b></function>"
        "</tool_call> Done.",
        Answer(content=" Done.", calls=[("a", "{}"), ("b", "{}")]),
    ),
    (  # Of no schema's: a text, line breaks within it and all.
        "<tool_call><function=f><parameter=a>\n\n5\n\n</parameter></function></tool_call>",
        Answer(calls=[("f", '{"a": "\\n5\\n"}')]),
    ),
    (  # As one line.
        "<tool_call><function=get_weather><parameter=days>3</parameter></function></tool_call>",
        Answer(calls=[("get_weather", '{"days": 3}')]),
    ),
    (  # Without the first mark: only a tool's name makes it a call.
        "<function=get_time>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
        Answer(calls=[("get_time", '{"a": "x"}')]),
    ),
    ("<function=f>\n</function>", Answer(content="<function=f>\n</function>")),
    (  # Without a value's last mark, and without the function's.
        "<tool_call><function=f><parameter=a>1<parameter=b>2</parameter></tool_call>",
        Answer(calls=[("f", '{"a": "1", "b": "2"}')]),
    ),
    (  # A value that the schema does not allow is a text.
        "<tool_call><function=get_weather><parameter=days>soon</parameter></function></tool_call>",
        Answer(calls=[("get_weather", '{"days": "soon"}')]),
    ),
    (  # Cut off in a text, in another value, and in a mark.
        '<tool_call><function=f><parameter=a>say "x',
        Answer(calls=[("f", '{"a": "say \\"x')]),
    ),
    (
        "<tool_call><function=get_weather><parameter=where>[1, 2",
        Answer(calls=[("get_weather", '{"where": [1, 2')]),
    ),
    (
        "<tool_call><function=f><parameter=a>1</parameter><para",
        Answer(calls=[("f", '{"a": "1"<para')]),
    ),
    ("<tool_call>\n<function=f", Answer(content="<tool_call>\n<function=f")),
    ("<tool_call>\n{}</tool_call>", Answer(content="<tool_call>\n{}</tool_call>")),
    (  # What is between parameters and no parameter stays with the arguments.
        "<tool_call><function=f><parameter=a>1</parameter> oh </function></tool_call>ok",
        Answer(content="ok", calls=[("f", '{"a": "1" oh </function>')]),
    ),
]

GLM45 = [
    (
        "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        Answer(content="I look.", calls=[("get_weather", '{"city": "Oslo", "days": 3}')]),
    ),
    (  # In one line, as GLM 4.7 writes it, and values as they are.
        "<tool_call>f<arg_key>a</arg_key><arg_value>\nx\n</arg_value></tool_call>",
        Answer(calls=[("f", '{"a": "\\nx\\n"}')]),
    ),
    ("<tool_call>get_time\n</tool_call>", Answer(calls=[("get_time", "{}")])),
    ("<tool_call>hello</tool_call>", Answer(content="<tool_call>hello</tool_call>")),
    (  # Without a value's last mark.
        "<tool_call>f<arg_key>a</arg_key><arg_value>x</tool_call>Done",
        Answer(content="Done", calls=[("f", '{"a": "x"}')]),
    ),
    (
        "<tool_call>f<arg_key>a</arg_key><arg_value>x",
        Answer(calls=[("f", '{"a": "x')]),
    ),
]

KIMI = [
    (
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0"
        '<|tool_call_argument_begin|>{"zone": "UTC"}<|tool_call_end|><|tool_call_begin|>'
        "functions.f:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        Answer(content="I look.", calls=[("get_time", '{"zone": "UTC"}'), ("f", "{}")]),
    ),
    (  # Cut off, and broken.
        '<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a": 1',
        Answer(calls=[("f", '{"a": 1')]),
    ),
    (
        '<|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a": ~}'
        "<|tool_call_end|><|tool_calls_section_end|>Oh.",
        Answer(content="Oh.", calls=[("f", '{"a": ~}')]),
    ),
    (
        "<|tool_calls_section_begin|>what?<|tool_calls_section_end|>",
        Answer("", "<|tool_calls_section_begin|>what?<|tool_calls_section_end|>"),
    ),
]

DEEPSEEK = [
    (  # V3
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n"
        "```json\n"
        '{"zone": "UTC"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Answer(content="I look.", calls=[("get_time", '{"zone": "UTC"}'), ("f", "{}")]),
    ),
    (  # V3.1
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>"
        '{"zone": "UTC"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        Answer(calls=[("get_time", '{"zone": "UTC"}')]),
    ),
    ("<｜tool▁call▁begin｜>", Answer("", "<｜tool▁call▁begin｜>")),
]

XML_SCHEMAS = {
    "get_weather": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "array"},
        }
    }
}


@pytest.mark.parametrize(
    ("tools", "text", "expected"),
    [
        *(("kimi_k2", *case) for case in KIMI),
        *(("deepseek_v3", *case) for case in DEEPSEEK),
        *(("qwen3_coder", *case) for case in QWEN3_CODER),
        *(("glm45", *case) for case in GLM45),
    ],
)
def test_calls_in_sections_and_xml_are_found_and_values_typed(
    tools: str, text: str, expected: Answer
) -> None:
    assert read_by_character(parsing(tools, schemas=XML_SCHEMAS), text) == expected


def test_a_call_keeps_the_name_that_the_model_has_for_it() -> None:
    parser = parsing("kimi_k2").parser("")
    begin = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
    )
    assert parser.feed(f'{begin}{{"')[0] == CallStart(0, "f", "functions.f:3")


def test_a_long_text_in_xml_goes_out_as_it_comes() -> None:
    parser = parsing("qwen3_coder").parser("")
    parser.feed("<tool_call><function=f><parameter=code>")
    assert parser.feed("def f():\n    retu") == [CallArguments(0, "def f():\\n    retu")]


@pytest.mark.parametrize(
    ("tools", "text", "expected"),
    [
        *(("hermes", *case) for case in HERMES),
        *(("llama3_json", *case) for case in LLAMA),
        *(("mistral", *case) for case in MISTRAL),
    ],
)
def test_tool_calls_are_found_and_all_else_is_content(
    tools: str, text: str, expected: Answer
) -> None:
    assert read_by_character(parsing(tools), text) == expected


@pytest.mark.parametrize(
    ("reasoning", "prompt_end", "text", "expected"),
    [
        ("qwen3", "", "<think>\nHm.\n</think>\n\nHi", Answer("Hm.", "Hi")),
        ("qwen3", "", "Hi </think> there", Answer("", "Hi </think> there")),
        ("qwen3", "<think>\n", "Hm.</think>Hi", Answer("Hm.", "Hi")),
        ("qwen3", "<think>\n", "<think>Hm.</think>Hi", Answer("Hm.", "Hi")),
        ("qwen3", "<think>\n\n</think>\n\n", "Hi", Answer("", "Hi")),
        ("qwen3", "", "<think>\n\n</think>\n\nHi", Answer("", "Hi")),
        ("qwen3", "", "<think>Cut o", Answer("Cut o")),
        ("qwen3", "", " <thin", Answer("", " <thin")),
        ("deepseek_r1", "", "Hm.\n</think>\nHi", Answer("Hm.", "Hi")),
        ("deepseek_r1", "", "<think>Hm.</think>Hi", Answer("Hm.", "Hi")),
        ("deepseek_r1", "</think>", "Hi", Answer("", "Hi")),
        ("mistral", "", "[THINK]Hm.[/THINK]Hi", Answer("Hm.", "Hi")),
    ],
)
def test_reasoning_ends_at_its_mark(
    reasoning: str, prompt_end: str, text: str, expected: Answer
) -> None:
    assert read_by_character(parsing("none", reasoning), text, prompt_end) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>Hi\n", Answer("", "Hi\n")),
        (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to=functions.f<|channel|>"
            'commentary json<|message|>{"a": 1}<|call|>',
            Answer("Hm", "", [("f", '{"a": 1}')]),
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary"
            " to=functions.f <|constrain|>json<|message|><|call|>",
            Answer("", "I look.", [("f", "{}")]),
        ),
        ("<|channel|>analysis to=python<|message|>1 + 1<|call|>", Answer("1 + 1")),
        ("Just text, no header.", Answer("", "Just text, no header.")),
        ("Yes", Answer("", "Yes")),
        ("<|channel|>analysis<|message|>Cut o", Answer("Cut o")),
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>assi", Answer("Hm")),
        ("<|channel|>oh, no<|message|>x", Answer("", "<|channel|>oh, no<|message|>x")),
    ],
)
def test_harmonys_channels_become_reasoning_content_and_calls(text: str, expected: Answer) -> None:
    assert read_by_character(parsing("gpt_oss", "gpt_oss"), text) == expected


def test_without_tools_harmonys_calls_are_content() -> None:
    how = parsing("gpt_oss", "gpt_oss")
    bare = type(how)(how.format)
    text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert read_by_character(bare, text) == Answer("", "{}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"city": "Oslo"}', Answer(calls=[("get_weather", '{"city": "Oslo"}')])),
        (' {"a": 1} and', Answer(content=" and", calls=[("get_weather", '{"a": 1}')])),
        ("I can't.", Answer("", "I can't.")),
    ],
)
def test_a_named_function_takes_all_as_its_arguments(text: str, expected: Answer) -> None:
    assert read_by_character(parsing(forced="get_weather"), text) == expected


@pytest.fixture(scope="module")
def encoding() -> HarmonyEncoding:
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


words = st.text("abc {}é🎉\n", min_size=1, max_size=10)
harmony_messages = st.one_of(
    st.tuples(st.just("analysis"), st.none(), words),
    st.tuples(st.just("final"), st.none(), words),
    st.tuples(st.just("commentary"), st.none(), words),
    st.tuples(
        st.just("commentary"),
        st.sampled_from(["get_time", "find-it"]),
        st.builds(json.dumps, st.dictionaries(words, words, max_size=2)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(harmony_messages, min_size=1, max_size=4),
    names_recipient_first=st.booleans(),
)
def test_harmony_is_read_as_its_own_library_reads_it(
    encoding: HarmonyEncoding,
    messages: list[tuple[str, str | None, str]],
    names_recipient_first: bool,
) -> None:
    text = ""
    for channel, function, body in messages:
        if function is None:
            header = f"<|channel|>{channel}"
        elif names_recipient_first:
            header = f" to=functions.{function}<|channel|>{channel} <|constrain|>json"
        else:
            header = f"<|channel|>{channel} to=functions.{function} <|constrain|>json"
        end = "<|end|>" if function is None else "<|call|>"
        text += f"{header}<|message|>{body}{end}<|start|>assistant"
    text = text.removesuffix("<|start|>assistant")

    theirs = StreamableParser(encoding, Role.ASSISTANT)
    for token in encoding.encode(text, allowed_special="all"):
        theirs.process(token)
    theirs.process_eos()
    reasoning, content, calls = [], [], []
    for message in theirs.messages:
        [part] = message.content
        assert isinstance(part, TextContent)
        if message.recipient is not None:
            calls.append((message.recipient.removeprefix("functions."), part.text))
        elif message.channel == "analysis":
            reasoning.append(part.text)
        else:
            content.append(part.text)

    ours = read_by_character(parsing("gpt_oss", "gpt_oss"), text)
    assert ours.calls == calls
    # White space next to marks is not ours to keep.
    assert ours.reasoning.split() == "\n".join(reasoning).split()
    assert ours.content.split() == "\n".join(content).split()


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        ("{{ messages }}", (), ModelFormat()),
        ("{{ tools }}<tool_call>", (), ModelFormat("hermes")),
        ("{{ tools }}<tool_call></think>", (), ModelFormat("hermes", "qwen3")),
        ("{{ tools }}<tool_call><function=f>", (), ModelFormat()),
        ("{{ tools }}<tool_call><function=f><parameter=", (), ModelFormat("qwen3_coder")),
        ("{{ tools }}<tool_call><arg_key>", (), ModelFormat()),
        ("{{ tools }}<tool_call><arg_key><arg_value></think>", (), ModelFormat("glm45", "qwen3")),
        ("<tool_call>", (), ModelFormat()),
        ("<｜Assistant｜><think>...</think>", (), ModelFormat("none", "deepseek_r1")),
        ("{{ tools }}", ("<|tool_calls_section_begin|>",), ModelFormat("kimi_k2")),
        ("{{ tools }}", ("<｜tool▁calls▁begin｜>",), ModelFormat("deepseek_v3")),
        ('{{ tools }} "parameters": ', ("<|python_tag|>",), ModelFormat("llama3_json")),
        ("{{ tools }}", ("[TOOL_CALLS]",), ModelFormat("mistral")),
        ("", ("[THINK]", "[/THINK]"), ModelFormat("none", "mistral")),
        ("{{ tools }}", MARKS, ModelFormat("gpt_oss", "gpt_oss")),
    ],
)
def test_a_format_is_detected_where_there_is_no_doubt(
    template: str, tokens: tuple[str, ...], expected: ModelFormat
) -> None:
    assert detected(template, lambda text: text in tokens) == expected


def test_what_a_worker_says_comes_before_what_its_files_tell() -> None:
    found = ModelFormat("hermes", "qwen3")
    assert chosen("", "auto", found) == found
    assert chosen("mistral", "none", found) == ModelFormat("mistral", "none")
    assert chosen("auto", "deepseek_r1", found) == ModelFormat("hermes", "deepseek_r1")
    assert chosen("gpt_oss", "auto", found) == ModelFormat("gpt_oss", "gpt_oss")
    assert chosen("from_the_future", "auto", found) == ModelFormat("none", "qwen3")
