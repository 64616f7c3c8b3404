"""Answers in items: the events of a stream come to what the whole answer is, however it is cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.anthropic.messages import MessagesDialect
from services.frontend.completion import Completion
from services.frontend.core.model_table import KnownModel
from services.frontend.models import ServedModel
from services.frontend.openai.formats import Answer
from services.frontend.openai.items import ItemDialect
from services.frontend.openai.parsed_chat import ParsedChoice
from services.frontend.openai.responses import ResponsesDialect
from services.frontend.openai.responses_body import ResponsesBody
from services.frontend.parsers.formats import ModelFormat, Parsing
from switchgear.common.v1 import generation_pb2
from tests.services.frontend.byte_model import TOKENIZER

PARSING = Parsing(ModelFormat("hermes", "qwen3"), frozenset({"f", "g"}))
PARTS = st.sampled_from(
    [
        "Some text. ",
        "größer 🗼\n",
        "<think>\nHm, yes.\n</think>\n\n",
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>\n',
        '<tool_call>{"name": "g"}</tool_call>',
        "<tool_call>{broken",
    ]
)
TEXTS = st.lists(PARTS, max_size=5).map("".join)
CUTS = st.lists(st.integers(0, 300), max_size=12)


@dataclass
class Ended:
    """What is looked at of a completion that is over."""

    finish_reason: generation_pb2.FinishReason.ValueType
    stop_string: str = ""


def usage() -> dict[str, Any]:
    return {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def started(dialect: ItemDialect) -> Answer:
    model = ServedModel(KnownModel(name="m"), TOKENIZER)
    answer = Answer(answer_id=f"{dialect.id_prefix}-1", model=model, created=1, usage=usage)
    parsed = ParsedChoice(
        PARSING.parser(""), includes_reasoning=True, max_calls=None, has_short_call_ids=False
    )
    dialect.shape(answer, 0, parsed)
    return answer


def whole(dialect: ItemDialect, text: str, ended: Completion) -> dict[str, Any]:
    answer = started(dialect)
    found: dict[str, Any] = json.loads(
        dialect.whole_answer(answer, [dialect.whole(text, None, ended)])
    )
    return found


def events(
    dialect: ItemDialect, text: str, cuts: list[int], ended: Completion
) -> list[dict[str, Any]]:
    answer = started(dialect)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stream = dialect.first_chunk()
    for begin, end in pairwise(places):
        stream += dialect.text_chunk(text[begin:end])
    stream += dialect.last_chunk(ended) + dialect.end_chunks(answer)
    found = []
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n", 1)
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def without_call_ids(value: Any) -> Any:
    """They are drawn anew for each answer."""
    if isinstance(value, dict):
        is_call = value.get("type") in ("tool_use", "function_call")
        gone = ("call_id",) if value.get("type") == "function_call" else ("id",) if is_call else ()
        return {key: without_call_ids(it) for key, it in value.items() if key not in gone}
    return [without_call_ids(it) for it in value] if isinstance(value, list) else value


def ends() -> st.SearchStrategy[Completion]:
    stop, length = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
    made = st.sampled_from([Ended(stop), Ended(length), Ended(stop, "zz")])
    return made.map(lambda ended: cast(Completion, ended))


@settings(max_examples=300, deadline=None)
@given(TEXTS, CUTS, ends())
def test_the_events_of_a_response(text: str, cuts: list[int], ended: Completion) -> None:
    body = ResponsesBody.model_validate({"model": "m", "input": "Hi"})
    seen = events(ResponsesDialect(body), text, cuts, ended)
    response = seen[-1]["response"]
    expected = whole(ResponsesDialect(body), text, ended)
    assert without_call_ids(response) == without_call_ids(expected)
    assert [event["sequence_number"] for event in seen] == [*range(len(seen))]

    begun: list[dict[str, Any]] = []
    texts: list[str] = []
    done: list[dict[str, Any]] = []
    for event in seen:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(begun) == len(done)
                begun.append(event["item"])
                texts.append("")
            case "response.output_item.done":
                done.append(event["item"])
                assert event["output_index"] == len(done) - 1
            case (
                "response.output_text.delta"
                | "response.reasoning_text.delta"
                | "response.function_call_arguments.delta"
            ):
                assert event["output_index"] == len(begun) - 1 == len(done)
                assert event["item_id"] == begun[-1]["id"]
                texts[-1] += event["delta"]
    assert done == response["output"]
    assert texts == [
        item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        for item in done
    ]


@settings(max_examples=300, deadline=None)
@given(TEXTS, CUTS, ends())
def test_the_events_of_a_message(text: str, cuts: list[int], ended: Completion) -> None:
    seen = events(MessagesDialect("r"), text, cuts, ended)
    message = seen[0]["message"]
    arguments = ""
    is_open = False
    for event in seen[1:]:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                is_open, arguments = True, ""
            case "content_block_delta":
                assert is_open
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "input_json_delta":
                        arguments += delta["partial_json"]
            case "content_block_stop":
                assert is_open
                is_open = False
                if message["content"][-1]["type"] == "tool_use":
                    message["content"][-1]["input"] = json.loads(arguments or "{}")
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    assert not is_open
    assert seen[-1]["type"] == "message_stop"
    expected = whole(MessagesDialect("r"), text, ended)
    assert without_call_ids(message) == without_call_ids(expected)
