"""Request bodies of OpenAI's API, and what of it is not offered here.

A known field that asks for something that is not offered is refused by name; at its neutral value
it is ignored. An unknown field is refused too, since a typing error must not go unnoticed.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from services.frontend.openai.constraints import ConstrainedBody
from services.frontend.openai.errors import ApiError
from services.frontend.openai.strict import Strict
from services.frontend.openai.tools import ToolBody
from services.frontend.pipeline import GenerationOptions
from switchgear.common.v1 import generation_pb2

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100
MAX_BIASED_TOKENS = 1024
MAX_SALT_CHARACTERS = 256

IGNORED = frozenset(
    {
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
"""Fields that change nothing about the text."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not offered, with the values (besides null) at which they ask for nothing."""

NEUTRAL_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


def _stop_strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def prompts_of(value: object) -> Any:
    """One list of prompts from the four forms that the API takes."""
    match value:
        case str():
            return [value]
        case [str(), *_] if all(isinstance(item, str) for item in value):
            return value
        case [int(), *_]:
            return [_token_ids(value)]
        case [[_, *_], *_]:
            return [_token_ids(item) for item in value]
        case _:
            raise ValueError(
                "must be a string, a list of strings, or lists of token ids, not empty"
            )


def _token_ids(value: object) -> list[int]:
    try:
        return list(array("I", value))  # type: ignore[call-overload]
    except (TypeError, OverflowError) as error:
        raise ValueError("token ids must be non-negative integers") from error


def _biases(value: object) -> object:
    """Token ids are strings in JSON."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) and key.isascii() and key.isdigit() for key in value):
        raise ValueError("keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's extension: with include_usage, every chunk has the usage so far."""
    include_obfuscation: bool = False
    """Ignored: padding against observers of the network is not offered."""


class GenerationBody(ConstrainedBody):
    """What chat and completions have in common. Absent and null are the same."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        BeforeValidator(_stop_strings),
    ] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    n: int = Field(default=1, ge=1, le=MAX_N)
    logit_bias: Annotated[
        dict[
            Annotated[int, Field(lt=2**32)],
            Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
        ],
        BeforeValidator(_biases),
    ] = Field(default_factory=dict, max_length=MAX_BIASED_TOKENS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier only; the answer says so when it is asked for."""

    # For the caller's own books: checked, and kept nowhere.
    user: str | None = None
    metadata: dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ] = Field(default_factory=dict, max_length=16)

    # vLLM's extensions.
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """0 and -1 consider all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    ignore_eos: bool = False
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default_factory=list, max_length=MAX_STOP_TOKEN_IDS
    )
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """Requests of a lower value are run first when not all can run at once."""
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """Cached blocks are shared with requests of the same salt only."""

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def includes_usage_so_far(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    @abstractmethod
    def logprob_options(self) -> generation_pb2.LogprobOptions | None:
        """None when the answer has no log probabilities."""

    @property
    def echoes(self) -> bool:
        """Whether the prompt's text comes before the answer's."""
        return False

    def param_of(self, param: str | None) -> str | None:
        """What this API calls a parameter that a worker complained of."""
        if param == "constraint":
            return next(iter(self.constraints()), param)
        return "logprobs" if param is not None and param.startswith("logprobs.") else param

    def check_together(self) -> None:
        """What no field can tell by itself. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options", "stream_options is only allowed when stream is true")
        if len(given := self.constraints()) > 1:
            raise _invalid([*given][1], f"{' and '.join(given)} can't be used together")

    def _options(
        self, max_tokens: int | None, max_tokens_param: str, prompt_param: str, choice: int
    ) -> GenerationOptions:
        return GenerationOptions(
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            prompt_param=prompt_param,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            stop_strings=self.stop,
            includes_stop=self.include_stop_str_in_output,
            keeps_special_tokens=not self.skip_special_tokens,
            logprobs=self.logprob_options,
            cache_salt=self.cache_salt,
            priority=self.priority,
            sampling=generation_pb2.SamplingOptions(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=None if self.top_k is None else max(0, self.top_k),
                min_p=self.min_p,
                # Engines take seeds of 63 bits. Choices of equal seeds would be equal.
                seed=None if self.seed is None else (self.seed + choice) & (2**63 - 1),
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                constraint=next(iter(self.constraints().values()), None),
            ),
        )


MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]


class ChatBody(ToolBody, GenerationBody):
    """POST /v1/chat/completions."""

    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def logprob_options(self) -> generation_pb2.LogprobOptions | None:
        if not self.logprobs:
            return None
        return generation_pb2.LogprobOptions(output_alternatives=self.top_logprobs or 0)

    def constraints(self) -> dict[str, generation_pb2.OutputConstraint]:
        found = super().constraints()
        if (schema := self.forced_schema()) is not None:
            found["tool_choice"] = generation_pb2.OutputConstraint(
                json_schema=orjson.dumps(schema).decode()
            )
        return found

    def check_together(self) -> None:
        self.check_tools()
        super().check_together()
        if self.top_logprobs and not self.logprobs:
            raise _invalid("top_logprobs", "top_logprobs is only allowed when logprobs is true")

    def options(self, choice: int = 0) -> GenerationOptions:
        """Of one of the n choices."""
        limit, name = self.max_tokens, "max_tokens"
        if self.max_completion_tokens is not None:
            limit, name = self.max_completion_tokens, "max_completion_tokens"
        return self._options(limit, name, "messages", choice)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(prompts_of)]
    max_tokens: MaxTokens = 16
    echo: bool = False
    best_of: int | None = None
    """No more are made than are given."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def logprob_options(self) -> generation_pb2.LogprobOptions | None:
        if self.logprobs is None:
            return None
        return generation_pb2.LogprobOptions(
            output_alternatives=self.logprobs,
            prompt_alternatives=self.logprobs if self.echo else None,
        )

    @property
    def echoes(self) -> bool:
        return self.echo

    def check_together(self) -> None:
        super().check_together()
        if self.best_of not in (None, self.n):
            raise _invalid(
                "best_of",
                "best_of is not supported with another value than n",
                "unsupported_parameter",
            )

    def options(self, choice: int = 0) -> GenerationOptions:
        """Of one of the n choices."""
        return self._options(self.max_tokens, "max_tokens", "prompt", choice)


ModelT = TypeVar("ModelT", bound=BaseModel)
BodyT = TypeVar("BodyT", bound=GenerationBody)


def parse(body: type[BodyT], fields: object) -> BodyT:
    """The checked body of a request to generate. Raises ApiError, naming the field."""
    parsed = checked(body, fields)
    parsed.check_together()
    return parsed


def checked(
    body: type[ModelT],
    fields: object,
    *,
    neutral: Mapping[str, tuple[object, ...]] = NEUTRAL,
    ignored: frozenset[str] = IGNORED,
) -> ModelT:
    """Any body whose fields hold by themselves. Raises ApiError, naming the field."""
    if not isinstance(fields, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "The body must be a JSON object")
    known = _without_neutral(fields, neutral, "")
    messages = known.get("messages")
    if isinstance(messages, list):
        known["messages"] = [
            _without_neutral(message, NEUTRAL_IN_MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    known = {name: value for name, value in known.items() if name not in ignored}
    try:
        return body.model_validate(known)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False)[0]) from None


def unoffered_fields(
    neutral: Mapping[str, tuple[object, ...]], ignored: frozenset[str]
) -> dict[str, dict[str, Any]]:
    """JSON schemas of the fields that are known and not offered."""
    return {
        name: {"enum": [None, *values], "description": "Not offered; at these values ignored."}
        for name, values in neutral.items()
    } | {name: {"description": "Accepted and ignored."} for name in sorted(ignored)}


def _invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def _without_neutral(
    fields: dict[str, Any], neutral: Mapping[str, tuple[object, ...]], prefix: str
) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in neutral:
            kept[name] = value
        elif not any(value == known and type(value) is type(known) for known in neutral[name]):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{prefix}{name} is not supported with this value",
                param=f"{prefix}{name}",
                code="unsupported_parameter",
            )
    return kept


def _api_error(issue: ErrorDetails) -> ApiError:
    param = ""
    for step in issue["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("#"):  # Which of several classes it is.
            param += f".{step}" if param else step
    match issue["type"]:
        case "missing":
            message, code = f"Missing required parameter: '{param}'", "missing_required_parameter"
        case "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}"
            code = "unknown_parameter"
        case "in_message":
            param = f"{param}.{issue['ctx']['field']}"
            message, code = f"{param} {issue['ctx']['what']}", "invalid_value"
            if issue["ctx"]["what"] == "is missing":
                code = "missing_required_parameter"
        case "value_error":
            message, code = f"{param}: {issue['ctx']['error']}", "invalid_value"
        case _:
            message, code = f"{param}: {issue['msg']}", "invalid_value"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)
