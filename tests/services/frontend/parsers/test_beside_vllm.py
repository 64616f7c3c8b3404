"""vLLM's own parsers read whole texts as ours do, where a text is as the model was taught."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from services.frontend.parsers.sections import DEEPSEEK_V3, KIMI_K2
from tests.services.frontend.parsers.reading import TOOL_NAMES, parsing, read_by_character
from tests.services.frontend.parsers.test_properties import (
    deepseek_call,
    glm_call,
    in_section,
    kimi_call,
    qwen_call,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

PYTHON = Path(__file__).parents[4] / ".venv-vllm" / "bin" / "python"
RUN_SECONDS = 250
TEXTS = 150
"""Of each format."""

TYPES: dict[str, list[Any]] = {
    "string": [
        "Oslo",
        "",
        "5",
        "true",
        "null",
        'quo"te\\',
        "two\nlines",
        "\n\nx\n",
        " 日本 🎉 ",
        "[1]",
    ],
    "integer": [0, -7, 10**30],
    "number": [0.5, -3, 1e300],
    "boolean": [True, False],
    "array": [[], [1, "a", None], [{"a": [1.5]}]],
    "object": [{}, {"a": {"b": "é"}}],
    "null": [None],
}


def hermes_call(name: str, given: dict[str, object], indent: int | None) -> str:
    arguments = json.dumps(given, ensure_ascii=False, indent=indent)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def kimi(name: str, given: dict[str, object], indent: int | None) -> str:
    return kimi_call(name, json.dumps(given, ensure_ascii=False, indent=indent), 0)


def deepseek(name: str, given: dict[str, object], indent: int | None) -> str:
    """On one line: theirs reads no other."""
    return deepseek_call(name, json.dumps(given, ensure_ascii=False))


WRITERS = {
    "qwen3_coder": qwen_call,
    "glm45": glm_call,
    "hermes": hermes_call,
    "kimi_k2": kimi,
    "deepseek_v3": deepseek,
}
SECTIONS = {"kimi_k2": KIMI_K2, "deepseek_v3": DEEPSEEK_V3}


def made_up(parser: str, number: int) -> dict[str, Any]:
    """A text with some calls, and the schemas of its tools; always the same."""
    draw = random.Random(f"{parser} {number}")
    names = draw.sample(sorted(TOOL_NAMES), draw.randint(1, len(TOOL_NAMES)))
    schemas, calls = {}, []
    for name in names:
        properties, given = {}, {}
        for key in draw.sample(["city", "days", "a-b", "größe"], draw.randint(0, 4)):
            kind = draw.choice([*TYPES])
            given[key] = draw.choice(TYPES[kind])
            properties[key] = draw.choice(
                [{"type": kind}, {"type": [kind]}, {"anyOf": [{"type": kind}]}]
            )
        schemas[name] = {"type": "object", "properties": properties}
        calls.append(WRITERS[parser](name, given, draw.choice([None, 2])))
    content = draw.choice(["", "I look.\n", "Größer {x} <b>\n\n"])
    written = "\n".join(calls)
    if marks := SECTIONS.get(parser):
        written = in_section(marks, calls)
    return {"parser": parser, "text": content + written, "schemas": schemas}


def test_whole_texts_are_read_as_vllm_reads_them() -> None:
    cases = [made_up(parser, number) for parser in WRITERS for number in range(TEXTS)]
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_calls.py")],
        input=json.dumps(cases),
        timeout=RUN_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == len(cases)
    for case, expected in zip(cases, theirs, strict=True):
        how = parsing(case["parser"], schemas=case["schemas"])
        ours = read_by_character(how, case["text"])
        calls = [[name, json.loads(arguments)] for name, arguments in ours.calls]
        assert calls == expected["calls"], case["text"]
        assert ours.content.strip() == (expected["content"] or "").strip(), case["text"]
