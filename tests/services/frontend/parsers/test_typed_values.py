"""Values as text, by their schemas."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.parsers.typed_values import json_of, types_of

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    max_leaves=5,
)
NAMES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


@given(VALUES)
def test_a_value_of_its_type_comes_back(value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    assert json.loads(json_of(text, frozenset({NAMES[type(value)]}))) == value


@given(
    st.text(st.characters(exclude_categories=["Cs"])), st.sets(st.sampled_from([*NAMES.values()]))
)
def test_whatever_comes_is_json(text: str, types: set[str]) -> None:
    value = json.loads(json_of(text, frozenset(types)))
    if types <= {"string"}:
        assert value == text


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("5", {"string"}, "5"),
        ("5", {"string", "integer"}, 5),
        ("5.5", {"integer"}, 5.5),
        ("five", {"integer"}, "five"),
        ("True", {"boolean"}, True),
        (" false\n", {"boolean"}, False),
        ("1", {"boolean"}, True),
        ("1", {"boolean", "integer"}, 1),
        ("None", {"null", "string"}, None),
        ("null", {"string"}, "null"),
        ('"x"', {"string", "object"}, '"x"'),
        ("NaN", {"number"}, "NaN"),
        ("1e999", {"number"}, "1e999"),
        ("[1e999]", {"array"}, "[1e999]"),
        ('{"a": "\\ud83d"}', {"object"}, '{"a": "\\ud83d"}'),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("9" * 5000, {"integer"}, "9" * 5000),
        ("[" * 100_000, {"array"}, "[" * 100_000),
    ],
)
def test_a_text_is_read_as_what_it_may_be(text: str, types: set[str], expected: object) -> None:
    assert json.loads(json_of(text, frozenset(types))) == expected


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (None, set()),
        ({}, set()),
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null", 5]}, {"string", "null"}),
        ({"enum": [1, "a", None, True, 0.5, [], {}]}, {*NAMES.values()}),
        ({"const": 5}, {"integer"}),
        ({"anyOf": [{"type": "string"}, {"allOf": [{"type": "array"}]}]}, {"string", "array"}),
        ({"$ref": "#/$defs/A"}, {"object"}),
        ({"$ref": "#/$defs/Loop"}, {"string"}),
        ({"$ref": "#/$defs/Nobody"}, set()),
        ({"$ref": "elsewhere", "type": {"not": "a name"}, "anyOf": 5, "enum": 5}, set()),
    ],
)
def test_types_are_found_wherever_a_schema_has_them(schema: object, expected: set[str]) -> None:
    definitions = {
        "A": {"type": "object"},
        "Loop": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Loop"}]},
    }
    assert types_of(schema, definitions) == expected


def test_definitions_that_name_each_other_many_times_are_looked_at_once() -> None:
    definitions: dict[str, object] = {
        str(number): {"anyOf": [{"$ref": f"#/$defs/{number + 1}"}] * 2} for number in range(100)
    }
    definitions["100"] = {"type": "integer"}
    assert types_of({"$ref": "#/$defs/0"}, definitions) == {"integer"}
