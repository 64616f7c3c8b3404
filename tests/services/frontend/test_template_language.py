"""The language of chat templates, beside transformers' own reading of it."""

from __future__ import annotations

import inspect
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from services.frontend.template_language import compiled
from tests.services.frontend import byte_model, tool_model

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße 🎉 {{ 1 }}"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": [1, None], "a": "é<"}}}],
    },
    {"role": "user", "content": "  \n"},
]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
]

TEMPLATES = {
    "a plain one": byte_model.TEMPLATE,
    "one with tools": tool_model.TEMPLATE,
    "blanks around blocks": """
        {% for message in messages %}
        {{ message.role }}:  {{ message.content | trim }}
            {%- if loop.last %} last {% endif +%}
        {% endfor %}

    """,
    "json": """{{ messages | tojson }}{{ tools | tojson(indent=2, sort_keys=True) }}
        {{ messages[1] | tojson(ensure_ascii=True) }}
        {{ messages[0] | tojson(separators=(',', ':')) }}
        {{ none | tojson }}{{ "</script>" | tojson }}""",
    "what training marks": """{% set said = 'outside' %}
        {% for message in messages %}
        {% generation %}{% set said = message.role %}{{ message.content }}|{{ said }}|
        {% endgeneration %}
        {% endfor %}{{ said }}""",
    "loop controls": """{% for message in messages %}
        {% if message.role == 'system' %}{% continue %}{% endif %}
        {% if message.tool_calls is defined %}{% break %}{% endif %}
        {{ message.content }}
        {% endfor %}""",
    "the year": "{{ strftime_now('%Y') }}",
    "names and macros": """{% set ns = namespace(system='') %}
        {%- macro turn(role, content='none') -%}
        <|{{ role }}|>{{ content or 'nothing' }}<|end|>
        {%- endmacro -%}
        {%- for message in messages if message.role != 'system' -%}
        {%- set ns.system = ns.system ~ loop.index0 -%}
        {{ turn(message.role, message.content) }}{{ turn('x') }}
        {%- endfor -%}
        {{ ns.system }}{{ unknown }}{{ add_generation_prompt }}{{ tools is none }}
        {{- messages[::-1] | map(attribute='role') | join(',') }}{{ '%05.1f' | format(2.25) }}""",
}

REJECTED = {
    "by its own word": "{{ raise_exception('roles must alternate') }}",
    "what leaves the sandbox": "{{ ''.__class__.__base__.__subclasses__() }}",
    "what changes the messages": "{{ messages.append(1) }}",
    "what there is none of": "{{ unknown.content.text }}",
    "an unfinished block": "{% for message in messages %}",
    "an unfinished mark": "{% generation %}",
    "an unknown tag": "{% training %}{% endtraining %}",
}


def theirs(template: str) -> str:
    rendered: Any = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=template, add_generation_prompt=True, bos="<s>"
    )
    [text], _ = rendered
    assert isinstance(text, str)
    return text


def ours(template: str) -> str:
    variables: dict[str, Any] = {"documents": None, "add_generation_prompt": True, "bos": "<s>"}
    return compiled(template).render(messages=MESSAGES, tools=TOOLS, **variables)


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_says_what_it_says_to_transformers(case: str) -> None:
    template = inspect.cleandoc(TEMPLATES[case]) + "\n"
    assert ours(template) == theirs(template)


@pytest.mark.parametrize("case", REJECTED)
def test_what_transformers_rejects_is_rejected_in_the_same_words(case: str) -> None:
    with pytest.raises(jinja2.TemplateError) as rejected:
        theirs(REJECTED[case])
    with pytest.raises(type(rejected.value)) as also_rejected:
        ours(REJECTED[case])
    assert str(also_rejected.value) == str(rejected.value)
