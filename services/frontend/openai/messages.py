"""The messages of a conversation: as clients send them, and as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from services.frontend.openai.strict import Strict


def joined_texts(value: object, fields: Mapping[str, str]) -> object:
    """A text, or parts that hold one, which become its paragraphs. `fields` says in which field a
    part of each type does."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValueError("content must be a string or a list of parts with a type")
        text = part.get(fields.get(kind, ""))
        if not isinstance(text, str):
            raise ValueError(f"part {index} is of type '{kind}'; only text is supported")
        texts.append(text)
    return "\n".join(texts)


def _text_content(value: object) -> object:
    return joined_texts(value, {"text": "text"})


class _FunctionCall(Strict):
    name: str
    arguments: str = ""

    def arguments_for_template(self) -> object:
        """Templates take an object; what is none they get as it is."""
        try:
            given = orjson.loads(self.arguments or "{}")
        except orjson.JSONDecodeError:
            return self.arguments
        return given if isinstance(given, dict) else self.arguments


class _ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: _FunctionCall
    index: int | None = None
    """Ignored: what is left of a stream's chunks."""

    def for_template(self) -> dict[str, Any]:
        function = {
            "name": self.function.name,
            "arguments": self.function.arguments_for_template(),
        }
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(Strict):
    """One message of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_content)] = None
    name: str | None = None
    tool_calls: list[_ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Another name for `reasoning`."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise _in_message("content", "is missing")
        if self.role != "assistant":
            for field in ("tool_calls", "reasoning", "reasoning_content"):
                if getattr(self, field):
                    raise _in_message(field, "is only allowed in an assistant's message")
        if (self.role == "tool") != (self.tool_call_id is not None):
            what = "is missing" if self.role == "tool" else "is only allowed in a tool's message"
            raise _in_message("tool_call_id", what)
        return self

    @property
    def characters(self) -> int:
        """What the prompt gets of it at least."""
        arguments = sum(len(call.function.arguments) for call in self.tool_calls)
        return len(self.content or "") + arguments

    def for_template(self, *, tool_name: str | None = None) -> dict[str, Any]:
        """As templates know it: they call a developer's message a system message.

        `tool_name` is whose result it is, which some templates ask for.
        """
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if name := self.name or tool_name:
            message["name"] = name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning or self.reasoning_content:
            message["reasoning"] = message["reasoning_content"] = reasoning
            if not self.content:
                # gpt-oss's template has a name of its own for it, and refuses it beside content.
                message["thinking"] = reasoning
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation; results of tools get the name of the call that they answer."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls}
        found.append(message.for_template(tool_name=names.get(message.tool_call_id or "")))
    return found


def _in_message(field: str, what: str) -> PydanticCustomError:
    """An error of one field that only the whole message shows."""
    return PydanticCustomError("in_message", "{what}", {"field": field, "what": what})
