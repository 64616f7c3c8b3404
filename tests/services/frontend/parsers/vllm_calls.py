"""What vLLM's own parsers make of whole texts. Runs where vLLM is installed.

python vllm_calls.py < [{"parser", "text", "schemas"}] > [{"content", "calls"}]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager


class Vocabulary:
    """As much of a tokenizer as parsers ask for: that their marks are tokens."""

    MARKS = (
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    )
    chat_template = ""
    all_special_tokens = ()
    all_special_ids = ()

    def get_vocab(self) -> dict[str, int]:
        return {mark: number for number, mark in enumerate(self.MARKS)}

    def encode(self, text: str, **_: object) -> list[int]:
        return [self.MARKS.index(text)] if text in self.MARKS else []

    def decode(self, token_ids: Iterable[int], **_: object) -> str:
        return "".join(self.MARKS[token_id] for token_id in token_ids)

    def convert_ids_to_tokens(self, token_ids: Iterable[int], **_: object) -> list[str]:
        return [self.MARKS[token_id] for token_id in token_ids]


def read(case: dict[str, Any]) -> dict[str, Any]:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in case["schemas"].items()
    ]
    request = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "Hi"}], tools=tools
    )
    parser = ToolParserManager.get_tool_parser(case["parser"])(Vocabulary(), request.tools)
    found = parser.extract_tool_calls(case["text"], request)
    calls = [[call.function.name, json.loads(call.function.arguments)] for call in found.tool_calls]
    return {"content": found.content, "calls": calls}


answers = [read(case) for case in json.load(sys.stdin)]
print(json.dumps(answers))
