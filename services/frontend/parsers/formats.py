"""The formats by name, and which of them a model's files tell of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.frontend.parsers.events import Output
from services.frontend.parsers.forced import NamedCallStage, RequiredCallsStage
from services.frontend.parsers.harmony import MARKS as HARMONY_MARKS
from services.frontend.parsers.harmony import HarmonyStage
from services.frontend.parsers.hermes import CLOSING, OPENING, HermesStage
from services.frontend.parsers.llama3_json import PYTHON_TAG, Llama3JsonStage
from services.frontend.parsers.mistral import ARGS, CALL_ID, TOOL_CALLS, MistralStage
from services.frontend.parsers.sections import DEEPSEEK_V3, KIMI_K2, SectionStage
from services.frontend.parsers.stage import ContentStage, OutputParser, Stage
from services.frontend.parsers.think import ThinkStage
from services.frontend.parsers.xml_calls import (
    GLM45,
    QWEN3_CODER,
    XmlFormat,
    XmlStage,
    parameter_types,
)

AUTO = "auto"
"""Takes the format that the model's files tell of, if any."""
NONE = "none"
"""No parser: all is content."""
HARMONY = "gpt_oss"
"""One format for both; reasoning and calls can't be told apart one without the other."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls."""

    stage: Callable[[Output, Parsing], Stage]
    """Takes the output, and what is known of the tools."""
    marks: tuple[str, ...]
    """Texts that the parser must see even where they are special tokens."""
    has_short_call_ids: bool = False
    """Its template takes only ids of nine letters and digits."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes reasoning."""

    opening: str
    closing: str
    begins_inside: bool = False
    """The model may leave the opening mark out."""


def _xml(marks: XmlFormat) -> ToolFormat:
    return ToolFormat(
        lambda output, parsing: XmlStage(
            output, marks, parsing.tool_names, parameter_types(parsing.tool_schemas)
        ),
        (OPENING, CLOSING),
    )


TOOL_FORMATS = {
    "hermes": ToolFormat(lambda output, _: HermesStage(output), (OPENING, CLOSING)),
    "llama3_json": ToolFormat(
        lambda output, parsing: Llama3JsonStage(output, parsing.tool_names), (PYTHON_TAG,)
    ),
    "mistral": ToolFormat(
        lambda output, _: MistralStage(output), (TOOL_CALLS, ARGS, CALL_ID), has_short_call_ids=True
    ),
    "kimi_k2": ToolFormat(lambda output, _: SectionStage(output, KIMI_K2), KIMI_K2.marks),
    "deepseek_v3": ToolFormat(
        lambda output, _: SectionStage(output, DEEPSEEK_V3), DEEPSEEK_V3.marks
    ),
    "qwen3_coder": _xml(QWEN3_CODER),
    "glm45": _xml(GLM45),
}

REASONING_FORMATS = {
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "deepseek_r1": ReasoningFormat("<think>", "</think>", begins_inside=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """How a model writes. Names of formats above, none of them AUTO."""

    tools: str = NONE
    reasoning: str = NONE


def chosen(tools: str, reasoning: str, found: ModelFormat) -> ModelFormat:
    """The formats of these names. AUTO, and no name, stand for what was detected; a name that is
    not known here stands for none."""
    tools = found.tools if tools in ("", AUTO) else tools
    reasoning = found.reasoning if reasoning in ("", AUTO) else reasoning
    if HARMONY in (tools, reasoning):
        return ModelFormat(HARMONY, HARMONY)
    return ModelFormat(
        tools if tools in TOOL_FORMATS else NONE,
        reasoning if reasoning in REASONING_FORMATS else NONE,
    )


def detected(template: str, is_token: Callable[[str], bool]) -> ModelFormat:
    """The formats that a model's chat template and tokenizer tell of without doubt.

    `is_token` tells whether a text is one token of its own.
    """
    if all(map(is_token, HARMONY_MARKS)):
        return ModelFormat(HARMONY, HARMONY)
    return ModelFormat(_detected_tools(template, is_token), _detected_reasoning(template, is_token))


def _detected_tools(template: str, is_token: Callable[[str], bool]) -> str:
    if "tools" not in template:
        return NONE
    if is_token(TOOL_CALLS):
        return "mistral"
    for name, marks in (("kimi_k2", KIMI_K2), ("deepseek_v3", DEEPSEEK_V3)):
        if is_token(marks.section):
            return name
    if OPENING in template:
        if "<function=" in template and "<parameter=" in template:
            return "qwen3_coder"
        if "<arg_key>" in template and "<arg_value>" in template:
            return "glm45"
        # What else has XML, not JSON, between the same marks is none of the known ones.
        return NONE if any(xml in template for xml in ("<function=", "<arg_key>")) else "hermes"
    if is_token(PYTHON_TAG) and '"parameters"' in template:
        return "llama3_json"
    return NONE


def _detected_reasoning(template: str, is_token: Callable[[str], bool]) -> str:
    if is_token("[THINK]") and is_token("[/THINK]"):
        return "mistral"
    if "</think>" in template:
        return "deepseek_r1" if "<｜Assistant｜>" in template else "qwen3"
    return NONE


@dataclass(frozen=True, slots=True)
class Parsing:
    """How the answers to one request are to be read."""

    format: ModelFormat
    tool_names: frozenset[str] = frozenset()
    """Tools that may be called; none turns their parser off."""
    tool_schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON schemas of the tools' arguments, by name, as far as there are any."""
    forced_name: str | None = None
    """All answers are the arguments of this function."""
    are_calls_required: bool = False
    """All answers are arrays of calls."""

    @property
    def is_needed(self) -> bool:
        """Without it an answer's text is its content."""
        return self._is_forced or self._tools != NONE or self.format.reasoning != NONE

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that the parser must see even where they are special tokens."""
        if self._is_forced:
            return ()
        if HARMONY in (self._tools, self.format.reasoning):
            return HARMONY_MARKS
        marks: tuple[str, ...] = ()
        if reasoning := REASONING_FORMATS.get(self.format.reasoning):
            marks += (reasoning.opening, reasoning.closing)
        if tools := TOOL_FORMATS.get(self._tools):
            marks += tools.marks
        return marks

    @property
    def has_short_call_ids(self) -> bool:
        """Call ids must be nine letters and digits, or the model's template refuses them."""
        tools = TOOL_FORMATS.get(self.format.tools)
        return tools is not None and tools.has_short_call_ids

    def parser(self, prompt_end: str) -> OutputParser:
        """A parser for one answer to a prompt that ends so."""
        output = Output()
        if self.forced_name is not None:
            return OutputParser(NamedCallStage(output, self.forced_name), output)
        if self.are_calls_required:
            return OutputParser(RequiredCallsStage(output), output)
        if HARMONY in (self._tools, self.format.reasoning):
            stage: Stage = HarmonyStage(output, offers_tools=self._tools == HARMONY)
            return OutputParser(stage, output)
        tools = TOOL_FORMATS.get(self._tools)
        stage = tools.stage(output, self) if tools else ContentStage(output)
        if reasoning := REASONING_FORMATS.get(self.format.reasoning):
            prompt_end = prompt_end.rstrip()
            stage = ThinkStage(
                output,
                stage,
                reasoning.opening,
                reasoning.closing,
                begins_inside=prompt_end.endswith(reasoning.opening)
                or (reasoning.begins_inside and not prompt_end.endswith(reasoning.closing)),
            )
        return OutputParser(stage, output)

    @property
    def _is_forced(self) -> bool:
        return self.forced_name is not None or self.are_calls_required

    @property
    def _tools(self) -> str:
        return self.format.tools if self.tool_names else NONE
