"""Tools that the model may call, and which of them it must."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, InstanceOf

from services.frontend.chat_template import Chat
from services.frontend.completion import Completion
from services.frontend.models import ServedModel
from services.frontend.openai.errors import ApiError
from services.frontend.openai.messages import ChatMessage, for_template
from services.frontend.openai.parsed_chat import ParsedChoice
from services.frontend.openai.strict import Strict
from services.frontend.parsers.formats import NONE, ModelFormat, Parsing

MAX_TOOLS = 128

# What a template gets from elsewhere. Clients can't replace the template itself either.
_TEMPLATE_OWN = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "tokenize",
        "tools",
    }
)


class _Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    """JSON schema of the arguments; empty for a function without any."""
    strict: bool | None = None
    """Whether arguments must keep to the schema. Only those of a forced call do."""


class _Tool(Strict):
    type: Literal["function"]
    function: _Function


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called, and which."""

    mode: Literal["auto", "none", "required", "named"]
    name: str = ""
    """The function to be called, when it is named."""


_AUTO = ToolChoice("auto")
_NONE = ToolChoice("none")


def _tool_choice(value: object) -> object:
    match value:
        case "auto" | "none" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name), **others}} if not others:
            return ToolChoice("named", name)
        case {"type": str(kind)} if kind != "function":
            raise ValueError(f"of type '{kind}' is not supported")
        case _:
            raise ValueError(
                "must be 'auto', 'none', 'required', or "
                "{'type': 'function', 'function': {'name': ...}}"
            )


class ToolBody(Strict):
    """The fields of a chat request that are about its messages, its tools and its template."""

    reasoning_param: ClassVar[str] = "reasoning_effort"
    """What the caller's API calls it, for errors."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[_Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[InstanceOf[ToolChoice] | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )

    # vLLM's extensions.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More for the template, such as enable_thinking."""
    include_reasoning: bool = True

    @property
    def choice(self) -> ToolChoice:
        """What `tool_choice` comes to."""
        return self.tool_choice or (_AUTO if self.tools else _NONE)

    def chat(self) -> Chat:
        """What the template gets. Without `tool_choice` none, that includes the tools."""
        tools = [] if self.choice.mode == "none" else self.tools
        variables = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        return Chat(
            for_template(self.messages),
            tools=[tool.model_dump(exclude_unset=True, exclude_none=True) for tool in tools],
            variables=variables,
        )

    def parsing(self, model: ServedModel) -> Parsing:
        """How the answers are to be read. Raises ApiError for what the model can't do."""
        tokenizer, choice = model.tokenizer, self.choice
        if self.reasoning_effort is not None and not tokenizer.template_has(
            "reasoning_effort", "enable_thinking"
        ):
            raise _refused(self.reasoning_param, "the model's chat template has no use for it")
        if not self.tools or choice.mode == "none":
            return Parsing(model.format)
        if not tokenizer.template_has("tools"):
            raise _refused("tools", "the model's chat template takes no tools")
        names = frozenset(tool.function.name for tool in self.tools)
        match choice.mode:
            case "named":
                return Parsing(_without_reasoning(model), names, forced_name=choice.name)
            case "required":
                return Parsing(_without_reasoning(model), names, are_calls_required=True)
            case _ if model.format.tools == NONE:
                raise _refused(
                    "tools",
                    "nobody knows how this model writes tool calls; its worker can be told with "
                    "--tool-parser",
                )
            case _:
                schemas = {tool.function.name: tool.function.parameters for tool in self.tools}
                return Parsing(model.format, names, schemas)

    def choice_of(self, parsing: Parsing, completion: Completion) -> ParsedChoice:
        """Takes the answer of a completion apart."""
        request = completion.request
        return ParsedChoice(
            parsing.parser(request.model.tokenizer.end_of(request.prompt)),
            includes_reasoning=self.include_reasoning,
            max_calls=None if self.parallel_tool_calls else 1,
            has_short_call_ids=parsing.has_short_call_ids,
        )

    def check_tools(self) -> None:
        """What no field can tell by itself. Raises ApiError."""
        if self.choice.mode in ("required", "named") and not self.tools:
            raise _refused("tool_choice", "is only allowed when tools are specified")
        if self.choice.mode == "named" and not self._named:
            raise _refused("tool_choice", f"there is no tool '{self.choice.name}'")
        for name in self.chat_template_kwargs:
            if name in _TEMPLATE_OWN:
                raise _refused(f"chat_template_kwargs.{name}", "can't be set here")

    def forced_schema(self) -> dict[str, Any] | None:
        """JSON schema of the whole output when `tool_choice` forces a call; else None."""
        match self.choice.mode:
            case "named":
                return _schema_of(self._named[0])
            case "required":
                schemas = {tool.function.name: _schema_of(tool.function) for tool in self.tools}
                # References are to the root of the schema they stand in.
                definitions: dict[str, Any] = {}
                for schema in schemas.values():
                    definitions |= schema.pop("$defs", {})
                return {
                    "type": "array",
                    "minItems": 1,
                    **({} if self.parallel_tool_calls else {"maxItems": 1}),
                    "items": {"anyOf": [_call_schema(*named) for named in schemas.items()]},
                    **({"$defs": definitions} if definitions else {}),
                }
            case _:
                return None

    @property
    def _named(self) -> list[_Function]:
        name = self.choice.name
        return [tool.function for tool in self.tools if tool.function.name == name]


def _without_reasoning(model: ServedModel) -> ModelFormat:
    return ModelFormat(tools=model.format.tools)


def _schema_of(function: _Function) -> dict[str, Any]:
    # Without a type any JSON would do, and arguments must be an object.
    return {"type": "object"} | function.parameters


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _refused(param: str, why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {why}", param=param, code=code)
