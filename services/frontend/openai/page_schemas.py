"""The words that JSON schemas of the page are written in."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def object_of(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
