"""A model's own chat template, rendered as Hugging Face's transformers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
import orjson

from libs.common.errors import InvalidRequest
from services.frontend.template_language import compiled


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the assistant to continue."""

    messages: Sequence[dict[str, Any]]
    """Each has `role`, `content`, and what else the caller gave, such as `name`."""
    begins_answer: bool = True
    """Whether the prompt ends with what opens the assistant's answer."""
    tools: Sequence[dict[str, Any]] = ()
    """JSON schemas of the functions that the assistant may call."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template is told, such as `enable_thinking`."""

    @property
    def characters(self) -> int:
        """About how much text it is."""
        characters = sum(len(message["content"]) for message in self.messages)
        for message in self.messages:
            if calls := message.get("tool_calls"):
                characters += len(str(calls))
        return characters + (len(str(self.tools)) if self.tools else 0)


# What templates raise on messages they were not written for, besides their own raise_exception.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Turns messages into the prompt text that the model was trained on."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """`tool_source` is used when there are tools, by models that have a template for that."""
        self._source = source
        self._tool_source = tool_source or source
        self._special_tokens = dict(special_tokens)

    @property
    def source(self) -> str:
        """All there is of it, for telling what the model can do."""
        same = self._tool_source == self._source
        return self._source if same else self._source + self._tool_source

    def render(self, chat: Chat) -> str:
        """The prompt text.

        Raises InvalidRequest when the template rejects the messages, such as for their order.
        """
        try:
            template = self._tool_template if chat.tools else self._template
            return template.render(
                messages=list(chat.messages),
                tools=list(chat.tools) or None,
                documents=None,
                add_generation_prompt=chat.begins_answer,
                **{**chat.variables, **self._special_tokens},
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template rejected the messages: {error}", param="messages"
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        return compiled(self._source)

    @cached_property
    def _tool_template(self) -> jinja2.Template:
        return compiled(self._tool_source)


def chat_template_of(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The template among a model's files; None for a model without one.

    It is in chat_template.jinja, or in tokenizer_config.json: a text, or a list of named ones.
    """
    config: dict[str, Any] = orjson.loads(files.get("tokenizer_config.json", b"{}"))
    source, tool_source = config.get("chat_template"), None
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source, tool_source = named.get("default"), named.get("tool_use")
    if "chat_template.jinja" in files:
        source, tool_source = files["chat_template.jinja"].decode(), None
    if not source:
        return None
    special_tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special_tokens[name] = text
    return ChatTemplate(source, special_tokens, tool_source)
