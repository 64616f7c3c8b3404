"""Values that a model writes as plain text, and the JSON that a tool's schema makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DEFINITIONS = "#/$defs/"


def types_of(schema: object, definitions: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a value may have; empty where the schema tells of none.

    `definitions` are what the schema's references are to.
    """
    return frozenset(_types_of(schema, definitions, set()))


def _types_of(schema: object, definitions: Mapping[str, Any], seen: set[str]) -> set[str]:
    """`seen` are references that were followed already, anywhere: once each is enough for all of
    their types, and definitions that name each other twice would take for ever otherwise."""
    if not isinstance(schema, Mapping):
        return set()
    found: set[str] = set()
    match schema.get("type"):
        case str(kind):
            found.add(kind)
        case [*kinds]:
            found.update(kind for kind in kinds if isinstance(kind, str))
    values = schema.get("enum")
    for value in values if isinstance(values, list) else []:
        found.add(_type_of(value))
    if "const" in schema:
        found.add(_type_of(schema["const"]))
    for choices in ("anyOf", "oneOf", "allOf"):
        listed = schema.get(choices)
        for choice in listed if isinstance(listed, list) else []:
            found |= _types_of(choice, definitions, seen)
    match schema.get("$ref"):
        case str(reference) if reference.startswith(_DEFINITIONS) and reference not in seen:
            seen.add(reference)
            named = definitions.get(reference.removeprefix(_DEFINITIONS))
            found |= _types_of(named, definitions, seen)
    return found


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def json_of(text: str, types: frozenset[str]) -> str:
    """A value of one of these types as JSON, if the text can be read as one, and else a string.

    The strictest reading wins: "5" is a number wherever a number may be. null and truth values may
    also be written as Python writes them, and the latter as digits, since models do.
    """
    if types - {"string"}:
        plain = text.strip()
        lower = plain.lower()
        if "null" in types and lower in ("null", "none"):
            return "null"
        if "boolean" in types and lower in ("true", "false"):
            return lower
        if (value := _parsed(plain)) is not None and _is_of(value, types):
            return json.dumps(value, ensure_ascii=False)
        if "boolean" in types and plain in ("0", "1"):
            return "true" if plain == "1" else "false"
    return json.dumps(text, ensure_ascii=False)


def _is_of(value: object, types: frozenset[str]) -> bool:
    kind = _type_of(value)
    if kind == "string":
        # Quotes belong to a text; only where there may be no text are they JSON's.
        return False
    return kind in types or (kind in ("integer", "number") and bool(types & {"integer", "number"}))


def _parsed(text: str) -> Any:
    """The JSON value; None as well for null, and for what no answer can carry."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
