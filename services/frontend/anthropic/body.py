"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat request that they
come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import orjson
from pydantic import BeforeValidator, Field, Tag
from pydantic.types import Discriminator

from services.frontend.models import ServedModel
from services.frontend.openai.constraints import JsonSchema, NamedSchema, ResponseFormat
from services.frontend.openai.errors import ApiError
from services.frontend.openai.messages import ChatMessage, joined_texts
from services.frontend.openai.schema import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    ChatBody,
    MaxTokens,
    checked,
)
from services.frontend.openai.strict import Strict
from services.frontend.openai.tools import MAX_TOOLS
from services.frontend.parsers.formats import NONE, Parsing
from services.frontend.pipeline import GenerationOptions

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
"""Fields that are not offered, with the values (besides null) at which they ask for nothing."""

IGNORED = frozenset({"cache_control", "diagnostics", "inference_geo"})
"""Fields that change nothing about the text. Prompts are cached whoever marks them."""


def _texts(value: object) -> object:
    return joined_texts(value, {"text": "text"})


class _Block(Strict):
    cache_control: dict[str, Any] | None = None
    """Ignored: prompts are cached whoever marks them."""


class _TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class _ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""
    """Not looked at: thinking is taken as it comes."""


class _RedactedThinkingBlock(_Block):
    """Somebody else's, which only they can read."""

    type: Literal["redacted_thinking"]
    data: str


class _ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None

    def for_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": orjson.dumps(self.input).decode()}
        return {"id": self.id, "function": function}


class _ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: Annotated[str, BeforeValidator(_texts)] = ""
    is_error: bool = False
    """Not told: no chat template has a place for it."""


def _kind_of(block: object) -> str:
    kind = block.get("type", "") if isinstance(block, dict) else getattr(block, "type", "")
    return f"#{kind}"


# A tag that begins with # is left out where an error names its field.
_AnyBlock: TypeAlias = Annotated[
    Annotated[_TextBlock, Tag("#text")]
    | Annotated[_ThinkingBlock, Tag("#thinking")]
    | Annotated[_RedactedThinkingBlock, Tag("#redacted_thinking")]
    | Annotated[_ToolUseBlock, Tag("#tool_use")]
    | Annotated[_ToolResultBlock, Tag("#tool_result")],
    Discriminator(_kind_of),
]
_KINDS_OF_ROLE = {
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "user": ("text", "tool_result"),
    "system": ("text",),
}


def _blocks(value: object) -> object:
    """A text is a block of its own. What is null in a block is as if it were not there."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of blocks")
    known = {kind for kinds in _KINDS_OF_ROLE.values() for kind in kinds}
    for index, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"block {index} must be an object with a type")
        if kind not in known:
            raise ValueError(f"block {index} is of type '{kind}', which is not supported")
    return [{name: it for name, it in block.items() if it is not None} for block in value]


class _Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_AnyBlock], BeforeValidator(_blocks)]

    def for_chat(self) -> list[ChatMessage]:
        """Results of tools are messages of their own, before the text that comes with them."""
        text = [block.text for block in self.content if isinstance(block, _TextBlock)]
        if self.role == "system":
            return [ChatMessage(role="system", content="\n".join(text))]
        if self.role == "user":
            messages = [
                ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=block.content)
                for block in self.content
                if isinstance(block, _ToolResultBlock)
            ]
            if text or not messages:
                messages.append(ChatMessage(role="user", content="\n".join(text)))
            return messages
        thoughts = [block.thinking for block in self.content if isinstance(block, _ThinkingBlock)]
        calls = [block.for_chat() for block in self.content if isinstance(block, _ToolUseBlock)]
        fields = {
            "role": "assistant",
            "content": "\n".join(text),
            "reasoning": "\n".join(thoughts) or None,
            "tool_calls": calls,
        }
        return [ChatMessage.model_validate(fields)]


class _CustomTool(Strict):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    """Makes no difference: only the arguments of a forced call are held to the schema."""
    eager_input_streaming: bool | None = None
    """Makes no difference: arguments are streamed as they come."""

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
        }
        return {"type": "function", "function": function}


class _ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def for_chat(self) -> object:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class _ThinkingConfig(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    """Not enforced: models end their thinking themselves."""
    display: Literal["summarized", "omitted"] | None = None
    """Thinking is told as it is, or omitted."""

    @property
    def is_on(self) -> bool:
        return self.type != "disabled"


class _OutputFormat(Strict):
    type: Literal["json_schema"]
    json_schema: Annotated[JsonSchema, Field(alias="schema")]


class _OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _OutputFormat | None = None


class _Caller(Strict):
    user_id: str | None = None


class MessagesChat(ChatBody):
    """A chat request whose fields go by the names of the Messages API in errors."""

    reasoning_param: ClassVar[str] = "output_config.effort"

    must_think: bool = False

    def param_of(self, param: str | None) -> str | None:
        found = super().param_of(param)
        return "output_config.format" if found == "response_format" else found

    def options(self, choice: int = 0) -> GenerationOptions:
        return self._options(self.max_tokens, "max_tokens", "messages", choice)

    def parsing(self, model: ServedModel) -> Parsing:
        if self.must_think and model.format.reasoning == NONE:
            raise _refused("thinking", "this model does not think")
        return super().parsing(model)


class PromptBody(Strict):
    """What makes up the prompt: POST /v1/messages/count_tokens."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[_Message] = Field(min_length=1)
    system: Annotated[str | None, BeforeValidator(_texts)] = None
    tools: list[_CustomTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: _ToolChoice | None = None
    thinking: _ThinkingConfig | None = None
    output_config: _OutputConfig | None = None

    def chat(self) -> MessagesChat:
        """The same as a chat request. Raises ApiError."""
        return self._chat({})

    def _chat(self, more: dict[str, Any]) -> MessagesChat:
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "tools": [tool.for_chat() for tool in self.tools],
            **more,
        }
        if (choice := self.tool_choice) is not None:
            if choice.type == "tool" and choice.name is None:
                raise _refused("tool_choice.name", "is missing")
            fields["tool_choice"] = choice.for_chat()
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if (thinking := self.thinking) is not None:
            fields["must_think"] = thinking.type == "enabled"
            fields["include_reasoning"] = thinking.is_on and thinking.display != "omitted"
            fields["chat_template_kwargs"] = {"enable_thinking": thinking.is_on}
        if (config := self.output_config) is not None:
            fields["reasoning_effort"] = config.effort
            if config.format is not None:
                schema = NamedSchema.model_validate(
                    {"name": "output", "schema": config.format.json_schema}
                )
                fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
        chat = checked(MessagesChat, fields)
        chat.check_together()
        return chat

    def _messages(self) -> Sequence[ChatMessage]:
        found = [] if self.system is None else [ChatMessage(role="system", content=self.system)]
        for number, message in enumerate(self.messages):
            for at, block in enumerate(message.content):
                if block.type not in _KINDS_OF_ROLE[message.role]:
                    raise _refused(
                        f"messages[{number}].content[{at}]",
                        f"a message of the {message.role} can't have a block of type {block.type}",
                    )
            found += message.for_chat()
        if self.messages[-1].role == "assistant":
            raise _refused(
                "messages", "the last must be the user's; to continue another is not supported"
            )
        return found


class MessagesBody(PromptBody):
    """POST /v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] = (
        Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    )
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    metadata: _Caller | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def chat(self) -> MessagesChat:
        return self._chat(
            {
                "max_tokens": self.max_tokens,
                "stop": self.stop_sequences,
                "stream": self.stream,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        )


def _refused(param: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {why}", param=param, code="invalid_value")
