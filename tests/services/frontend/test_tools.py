"""The JSON schema that a forced call must keep to."""

from __future__ import annotations

from typing import Any

from services.frontend.openai.tools import ToolBody


def body(choice: object, **fields: Any) -> ToolBody:
    return ToolBody.model_validate(
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [
                {"type": "function", "function": {"name": "now"}},
                {
                    "type": "function",
                    "function": {
                        "name": "find",
                        "parameters": {
                            "type": "object",
                            "properties": {"place": {"$ref": "#/$defs/place"}},
                            "$defs": {"place": {"type": "string"}},
                        },
                    },
                },
            ],
            "tool_choice": choice,
        }
        | fields
    )


def test_a_named_function_is_forced_by_the_schema_of_its_arguments() -> None:
    now = {"type": "function", "function": {"name": "now"}}
    find = {"type": "function", "function": {"name": "find"}}
    assert body(now).forced_schema() == {"type": "object"}
    assert body(find).forced_schema() == {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}},
        "$defs": {"place": {"type": "string"}},
    }


def test_any_call_is_forced_by_an_array_of_calls_with_definitions_at_its_root() -> None:
    find = {"type": "object", "properties": {"place": {"$ref": "#/$defs/place"}}}
    assert body("required").forced_schema() == {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "parameters": parameters},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for name, parameters in (("now", {"type": "object"}), ("find", find))
            ]
        },
        "$defs": {"place": {"type": "string"}},
    }
    assert (body("required", parallel_tool_calls=False).forced_schema() or {})["maxItems"] == 1


def test_nothing_is_forced_otherwise() -> None:
    for choice in ("auto", "none"):
        assert body(choice).forced_schema() is None
