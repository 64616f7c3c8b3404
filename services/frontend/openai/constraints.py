"""What an answer must look like: `response_format`, and vLLM's extensions for the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, Field, model_validator

from services.frontend.openai.strict import Strict
from switchgear.common.v1.generation_pb2 import Choices, OutputConstraint

MAX_CHOICES = 1024

_Text = Annotated[str, Field(min_length=1)]
_Choices = Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)]


def _json_of(schema: dict[str, Any] | str) -> str:
    try:
        if isinstance(schema, str):
            orjson.loads(schema)
            return schema
        return orjson.dumps(schema).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise ValueError(f"not a JSON schema: {error}") from None


JsonSchema = Annotated[dict[str, Any] | str, AfterValidator(_json_of)]
"""As JSON, once validated. Whether it is a schema that can be followed is for the engine to say."""


class NamedSchema(Strict):
    """A JSON schema and what goes with it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None
    """Makes no difference: a schema is always followed."""


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a json_schema belongs to the type json_schema, and to no other")
        return self

    def constraint(self) -> OutputConstraint | None:
        """None for plain text."""
        if self.json_schema is not None:
            return OutputConstraint(json_schema=str(self.json_schema.json_schema))
        return OutputConstraint(json_object=True) if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    json_schema: Annotated[JsonSchema | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = None

    @model_validator(mode="after")
    def _has_one(self) -> StructuredOutputs:
        given = (self.json_schema, self.json_object, self.regex, self.choice, self.grammar)
        if len(given) - given.count(None) != 1:
            raise ValueError("must have one of json, json_object, regex, choice and grammar")
        return self

    def constraint(self) -> OutputConstraint:
        constraint = OutputConstraint()
        if self.json_schema is not None:
            constraint.json_schema = str(self.json_schema)
        elif self.json_object is not None:
            constraint.json_object = True
        elif self.regex is not None:
            constraint.regex = self.regex
        elif self.choice is not None:
            constraint.choices.texts.extend(self.choice)
        elif self.grammar is not None:
            constraint.grammar = self.grammar
        return constraint


class ConstrainedBody(Strict):
    """The fields of a request body that say what the answer must look like."""

    response_format: ResponseFormat | None = None

    # vLLM's extensions, the newer one and those that it replaces.
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: _Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Text | None = None

    def constraints(self) -> dict[str, OutputConstraint]:
        """All that were given, by the name of the field."""
        if self.model_fields_set.isdisjoint(ConstrainedBody.model_fields):
            return {}
        found = {
            "response_format": self.response_format and self.response_format.constraint(),
            "structured_outputs": self.structured_outputs and self.structured_outputs.constraint(),
            "guided_json": self.guided_json and OutputConstraint(json_schema=str(self.guided_json)),
            "guided_regex": self.guided_regex and OutputConstraint(regex=self.guided_regex),
            "guided_choice": self.guided_choice
            and OutputConstraint(choices=Choices(texts=self.guided_choice)),
            "guided_grammar": self.guided_grammar and OutputConstraint(grammar=self.guided_grammar),
        }
        return {name: constraint for name, constraint in found.items() if constraint}
