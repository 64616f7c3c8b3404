"""What chat templates are written in: Jinja, with what Hugging Face's transformers adds to it.

Its documentation of chat templates is the specification: block tags take their line's blanks with
them, `tojson` escapes nothing for HTML, and there are `raise_exception`, `strftime_now`, loop
controls, and a tag around what the assistant has said.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}`: marks for training what the assistant has said. Here it is its content,
    in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012, as Jinja has it.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_ENVIRONMENT = _environment()


def compiled(source: str) -> jinja2.Template:
    """A model's template, in a sandbox. Raises jinja2.TemplateSyntaxError."""
    template = _ENVIRONMENT.from_string(source)
    # Jinja copies them for each text, and a chain of maps takes as long as the rest.
    template.globals = dict(template.globals)
    return template
