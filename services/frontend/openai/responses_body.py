"""The body of POST /v1/responses, and the chat request that it comes to.

Where nothing is kept between requests a conversation comes whole in `input` each time: what the
answers' `output` had, and what followed. Where responses are kept it may begin with one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, InstanceOf, Tag, TypeAdapter, model_validator
from pydantic.types import Discriminator

from services.frontend.openai.constraints import JsonSchema, NamedSchema, ResponseFormat
from services.frontend.openai.messages import ChatMessage, joined_texts
from services.frontend.openai.schema import MAX_LOGPROBS, ChatBody, MaxTokens, checked
from services.frontend.openai.strict import Strict
from services.frontend.openai.tools import MAX_TOOLS, ToolChoice
from services.frontend.pipeline import GenerationOptions

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "truncation": ("disabled",),
}
"""Fields that are not offered, with the values (besides null) at which they ask for nothing."""

NEUTRAL_WITH_STORE: Mapping[str, tuple[object, ...]] = {
    name: values
    for name, values in NEUTRAL.items()
    if name not in ("previous_response_id", "store")
}
"""The same where responses are kept."""

IGNORED = frozenset(
    {
        "max_tool_calls",  # Of OpenAI's own tools, of which there are none here.
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
"""Fields that change nothing about the text."""

LOGPROBS = "message.output_text.logprobs"

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_THOUGHTS = {"reasoning_text": "text", "summary_text": "text"}


def _texts(value: object) -> object:
    return joined_texts(value, _TEXTS)


def _thoughts(value: object) -> object:
    return joined_texts(value, _THOUGHTS)


class _MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_texts)]

    # As answers have them; they make no difference here.
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    id_prefix: ClassVar[str] = "msg"

    def resource(self) -> dict[str, Any]:
        """What the item is, as the API tells it; all of `resource` are without id and status."""
        if self.role == "assistant":
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": self.content}
        else:
            part = {"type": "input_text", "text": self.content}
        return {"type": "message", "role": self.role, "content": [part]}


class _ReasoningItem(Strict):
    type: Literal["reasoning"]
    content: Annotated[str, BeforeValidator(_thoughts)] = ""
    summary: Annotated[str, BeforeValidator(_thoughts)] = ""
    """Stands in for a content that was not sent."""
    encrypted_content: str | None = None
    """Somebody else's, and of no use here."""
    id: str | None = None
    status: str | None = None

    id_prefix: ClassVar[str] = "rs"

    def resource(self) -> dict[str, Any]:
        thought = {"type": "reasoning_text", "text": self.content or self.summary}
        return {"type": "reasoning", "summary": [], "content": [thought]}


class _CallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None

    id_prefix: ClassVar[str] = "fc"

    def resource(self) -> dict[str, Any]:
        called = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"type": "function_call", **called}


class _CallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Annotated[str, BeforeValidator(_texts)]
    id: str | None = None
    status: str | None = None

    id_prefix: ClassVar[str] = "fco"

    def resource(self) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": self.call_id, "output": self.output}


def _kind_of(item: object) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return f"#{kind}"


# A tag that begins with # is left out where an error names its field.
Item: TypeAlias = Annotated[
    Annotated[_MessageItem, Tag("#message")]
    | Annotated[_ReasoningItem, Tag("#reasoning")]
    | Annotated[_CallItem, Tag("#function_call")]
    | Annotated[_CallOutputItem, Tag("#function_call_output")],
    Discriminator(_kind_of),
]
_KINDS = frozenset({"message", "reasoning", "function_call", "function_call_output"})


def _items(value: object) -> object:
    """A text is a user's message. What is null in an item is as if it were not there."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"item {index} must be an object")
        kind = "message" if item.get("type") is None else item["type"]
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"item {index} is of type '{kind}', which is not supported")
    return [{name: it for name, it in item.items() if it is not None} for item in value]


class _FunctionTool(Strict):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Makes no difference: only the arguments of a forced call are held to the schema."""

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters or {},
        }
        return {"type": "function", "function": function}


def _tool_choice(value: object) -> object:
    match value:
        case "auto" | "none" | "required":
            return ToolChoice(value)
        case {"type": "function", "name": str(name), **others} if not others:
            return ToolChoice("named", name)
        case {"type": str(kind)} if kind != "function":
            raise ValueError(f"of type '{kind}' is not supported")
        case _:
            raise ValueError(
                "must be 'auto', 'none', 'required', or {'type': 'function', 'name': ...}"
            )


class _TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    json_schema: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Makes no difference: a schema is always followed."""

    @model_validator(mode="after")
    def _has_its_schema(self) -> _TextFormat:
        has_schema = self.name is not None and self.json_schema is not None
        if (self.type == "json_schema") != has_schema:
            raise ValueError("name and schema belong to the type json_schema, and to no other")
        return self

    def response_format(self) -> ResponseFormat:
        if self.json_schema is None or self.name is None:
            return ResponseFormat(type=self.type)
        schema = NamedSchema.model_validate({"name": self.name, "schema": self.json_schema})
        return ResponseFormat(type="json_schema", json_schema=schema)


class _TextSettings(Strict):
    format: _TextFormat | None = None
    verbosity: Literal["medium"] | None = None
    """Others are not offered."""


class _ReasoningSettings(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """None are made: reasoning is told as it is."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class _ResponseStreamOptions(Strict):
    include_obfuscation: bool = False
    """Ignored: padding against observers of the network is not offered."""


class ResponsesChat(ChatBody):
    """A chat request whose fields go by the names of the responses API in errors."""

    reasoning_param: ClassVar[str] = "reasoning.effort"

    def param_of(self, param: str | None) -> str | None:
        found = super().param_of(param)
        return {"response_format": "text.format", "messages": "input"}.get(found or "", found)

    def options(self, choice: int = 0) -> GenerationOptions:
        return self._options(self.max_tokens, "max_output_tokens", "input", choice)


class ResponsesBody(Strict):
    """POST /v1/responses."""

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[list[Item], BeforeValidator(_items), Field(min_length=1)]
    instructions: str | None = None
    tools: list[_FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[InstanceOf[ToolChoice] | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    text: _TextSettings | None = None
    reasoning: _ReasoningSettings | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Alternatives of each token, where `include` asks for log probabilities."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default_factory=list
    )
    """Reasoning is not encrypted here, and always included."""
    stream: bool = False
    stream_options: _ResponseStreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ] = Field(default_factory=dict, max_length=16)
    user: str | None = None

    @property
    def chosen_tool(self) -> str | dict[str, str]:
        """`tool_choice` as answers tell it."""
        choice = self.tool_choice or ToolChoice("auto")
        if choice.mode == "named":
            return {"type": "function", "name": choice.name}
        return choice.mode

    def chat(self) -> ResponsesChat:
        """The same as a chat request. Raises ApiError."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "tools": [tool.for_chat() for tool in self.tools],
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": LOGPROBS in self.include,
        }
        if self.tool_choice is not None:
            choice = self.tool_choice
            named = {"type": "function", "function": {"name": choice.name}}
            fields["tool_choice"] = named if choice.mode == "named" else choice.mode
        if fields["logprobs"]:
            fields["top_logprobs"] = self.top_logprobs
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.response_format()
        chat = checked(ResponsesChat, fields)
        chat.check_together()
        return chat

    def _messages(self) -> list[ChatMessage]:
        """What belongs to one turn of the assistant becomes one message, as templates want it."""
        messages: list[ChatMessage] = []
        turn: dict[str, Any] = {}

        def end_turn() -> None:
            if turn:
                messages.append(ChatMessage.model_validate({"content": "", **turn}))
                turn.clear()

        if self.instructions is not None:
            messages.append(ChatMessage(role="system", content=self.instructions))
        for item in self.input:
            match item:
                case _ReasoningItem():
                    end_turn()
                    thought = item.content or item.summary
                    turn |= {"role": "assistant", "reasoning": thought or None}
                case _MessageItem(role="assistant"):
                    if "content" in turn or "tool_calls" in turn:
                        end_turn()
                    turn |= {"role": "assistant", "content": item.content}
                case _CallItem():
                    function = {"name": item.name, "arguments": item.arguments}
                    turn["role"] = "assistant"
                    turn.setdefault("tool_calls", []).append(
                        {"id": item.call_id, "function": function}
                    )
                case _CallOutputItem():
                    end_turn()
                    messages.append(
                        ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output)
                    )
                case _MessageItem():
                    end_turn()
                    _add_message(messages, item)
        end_turn()
        return messages


class StoredResponsesBody(ResponsesBody):
    """POST /v1/responses where responses are kept."""

    previous_response_id: str | None = None
    """The conversation begins with that response and all that it was given, but for its
    instructions."""
    store: bool | None = None
    """None keeps the response, too, as OpenAI does; but only where that can be done."""


_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(Annotated[list[Item], BeforeValidator(_items)])


def items_of(resources: list[dict[str, Any]]) -> list[Item]:
    """Items that the API told of, to be given to it again."""
    return _ITEMS.validate_python(resources)


def _add_message(messages: list[ChatMessage], item: _MessageItem) -> None:
    """Most templates take one system message, so what follows the instructions becomes theirs."""
    is_system = item.role in ("system", "developer")
    if is_system and len(messages) == 1 and messages[0].role == "system":
        text = f"{messages[0].content}\n\n{item.content}"
        messages[0] = ChatMessage(role="system", content=text)
    else:
        messages.append(ChatMessage(role=item.role, content=item.content))
