"""From a prompt in a caller's words to a running completion: what both APIs share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar, assert_never

import msgspec

from libs.common import tracing
from libs.common.errors import (
    ContextTooLong,
    InvalidRequest,
    ModelNotAllowed,
    NoLiveInstance,
    Overloaded,
    SwitchgearError,
)
from services.frontend import request_trace
from services.frontend.access import Access, Caller
from services.frontend.chat_template import Chat
from services.frontend.completion import LONG_PROMPT_TOKENS, Completion, TextRequest
from services.frontend.config import FrontendSettings
from services.frontend.core.attempt import MigrationPolicy
from services.frontend.embedding import Embedding, EmbeddingRequest
from services.frontend.intake import Intake
from services.frontend.metrics import FrontendMetrics
from services.frontend.models import Models, ServedModel
from services.frontend.router_session import RouterSessions
from switchgear.common.v1 import generation_pb2, routing_pb2

LONG_PROMPT_CHARACTERS = 4096
"""Tokenising more than this takes milliseconds, which belong in a thread. In the loop it would
delay everyone's tokens; for less the way to a thread costs more."""

LONG_ECHO_TOKENS = 1024
"""Turning more than this into text takes milliseconds, too."""

BUSY_RETRY_SECONDS = 1.0

Prompt: TypeAlias = str | Chat | list[int]
"""A plain text, a conversation for the chat template, or token ids."""

PromptT = TypeVar("PromptT", str, Chat)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptions:
    """How to embed, in the caller's terms."""

    input_param: str = "input"
    """What the caller's API calls the inputs, for errors."""
    dimensions: int | None = None
    truncate_tokens: int | None = None
    """Longer inputs keep so many tokens; -1: as many as the context has. None refuses them."""
    truncate_param: str = "truncate_prompt_tokens"
    truncation_side: str | None = None
    """Where longer inputs are cut, `left` or `right`; None: as the model's tokenizer has it."""
    adds_special_tokens: bool = True
    cache_salt: str = ""
    priority: int = 0


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate, in the caller's terms. The API has checked each value by itself."""

    max_tokens: int | None = None
    """None: as many as fit into the context."""
    max_tokens_param: str = "max_tokens"
    """What the caller's API calls it, for errors."""
    prompt_param: str = "prompt"
    """What the caller's API calls the prompt, for errors."""
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    includes_stop: bool = False
    keeps_special_tokens: bool = False
    marks: Sequence[str] = ()
    """Special tokens that have a text, for what reads the answer."""
    sampling: generation_pb2.SamplingOptions = msgspec.field(
        default_factory=generation_pb2.SamplingOptions
    )
    logprobs: generation_pb2.LogprobOptions | None = None
    cache_salt: str = ""
    priority: int = 0


class Pipeline:
    """Admission, tokenising, limits, and the start of completions and embeddings."""

    def __init__(
        self,
        settings: FrontendSettings,
        models: Models,
        sessions: RouterSessions,
        metrics: FrontendMetrics,
        access: Access,
    ) -> None:
        self.settings = settings
        self.access = access
        self.models = models
        self.sessions = sessions
        self.metrics = metrics
        self.is_draining = False
        """New requests are refused; running ones go on."""
        self._intake = Intake()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._policy = MigrationPolicy(
            max_attempts=settings.max_attempts, patience_seconds=settings.patience_seconds
        )

    def problem(self) -> str:
        """Why nobody can be served, for people; empty when all is well."""
        if self.is_draining:
            return "draining"
        if problem := self.models.problem():
            return problem
        return "" if self.sessions.is_connected else "no router can be reached"

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """A place among the requests in progress while the body runs.

        Raises Overloaded when there is none, RequestsLimited or TokensLimited when the caller has
        none, and NoLiveInstance while draining.
        """
        if self.is_draining:
            raise NoLiveInstance("this frontend is shutting down", retry_after_seconds=1)
        if self._in_flight >= self.settings.max_concurrent_requests:
            raise Overloaded(
                "too many requests in progress", retry_after_seconds=BUSY_RETRY_SECONDS
            )
        self._in_flight += 1
        self._idle.clear()
        self.metrics.in_flight.set(self._in_flight)
        try:
            with caller.admitted():
                yield
        except SwitchgearError as error:
            self.metrics.errors.labels(error.reason).inc()
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            self.metrics.in_flight.set(self._in_flight)

    def model_for(self, caller: Caller, name: str) -> ServedModel:
        """The model of that name or alias.

        Raises ModelNotFound, ModelNotAllowed, and NoLiveInstance for one that can't be served now.
        """
        self.check_allowed(caller, name)
        return self.models.get(name)

    def check_allowed(self, caller: Caller, name: str) -> None:
        """Raises ModelNotAllowed for a known model that is not for this caller."""
        canonical = self.models.canonical_name(name)
        if canonical and not caller.may_use(name, canonical):
            raise ModelNotAllowed(
                f"The API key '{caller.key_id}' does not have access to model '{name}'",
                param="model",
            )

    async def wait_idle(self, seconds: float) -> None:
        """Returns when no request is in progress, or after that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    async def tokenise(
        self, model: ServedModel, prompt: Prompt, *, adds_special_tokens: bool = True
    ) -> list[int]:
        """Tokens of a prompt. Raises InvalidRequest for what the model can't take.

        `adds_special_tokens` matters to plain texts only.
        """
        await self._intake.turn()
        tokenizer = model.tokenizer
        match prompt:
            case str():
                encode = partial(tokenizer.encode, adds_special_tokens=adds_special_tokens)
                return await _near_or_far(encode, prompt, len(prompt))
            case Chat():
                return await _near_or_far(tokenizer.encode_chat, prompt, prompt.characters)
            case list():
                return _checked(prompt, tokenizer.vocabulary_tokens)
            case _:
                assert_never(prompt)

    async def tokenise_inputs(
        self, model: ServedModel, inputs: Sequence[Prompt], options: EmbeddingOptions
    ) -> list[list[int]]:
        """Tokens of each input, cut where that is asked for. Raises InvalidRequest."""
        await self._intake.turn()
        context_tokens = model.facts.context_length_tokens
        most_tokens = options.truncate_tokens
        if most_tokens is not None and most_tokens > context_tokens:
            raise InvalidRequest(
                f"{options.truncate_param} must be at most the context of {context_tokens} "
                f"tokens, got {most_tokens}",
                param=options.truncate_param,
            )
        if most_tokens == -1:
            most_tokens = context_tokens
        tokenizer = model.tokenizer
        side = options.truncation_side or tokenizer.truncation_side

        def cut(token_ids: list[int]) -> list[int]:
            if most_tokens is None or len(token_ids) <= most_tokens:
                return token_ids
            return token_ids[-most_tokens:] if side == "left" else token_ids[:most_tokens]

        def tokens_of(prompt: Prompt) -> list[int]:
            match prompt:
                case str():
                    token_ids = tokenizer.encode(
                        prompt, adds_special_tokens=options.adds_special_tokens
                    )
                    if most_tokens is None or len(token_ids) <= most_tokens:
                        return token_ids
                    return tokenizer.encode_cut(
                        prompt, most_tokens, side, adds_special_tokens=options.adds_special_tokens
                    )
                case Chat():
                    return cut(tokenizer.encode_chat(prompt))
                case list():
                    return cut(_checked(prompt, tokenizer.vocabulary_tokens, options.input_param))
                case _:
                    assert_never(prompt)

        def all_tokens() -> list[list[int]]:
            return [tokens_of(prompt) for prompt in inputs]

        characters = sum(len(p) if not isinstance(p, Chat) else p.characters for p in inputs)
        if characters > LONG_PROMPT_CHARACTERS:
            return await asyncio.to_thread(all_tokens)
        return all_tokens()

    def start_embedding(
        self,
        request_id: str,
        model: ServedModel,
        inputs: Sequence[list[int]],
        options: EmbeddingOptions,
        *,
        caller: Caller,
        traceparent: str,
        routing: routing_pb2.RoutingOptions | None = None,
        accepted_at: float,
        deadline: float,
    ) -> Embedding:
        """An embeddings call to run; nothing is sent before that.

        Raises InvalidRequest, or ContextTooLong, for what does not fit the model, TokensLimited
        when the caller has not enough left for all inputs, and RoutingNotAllowed.
        """
        context_tokens = model.facts.context_length_tokens
        for index, token_ids in enumerate(inputs):
            param = options.input_param if len(inputs) == 1 else f"{options.input_param}[{index}]"
            if not token_ids:
                raise InvalidRequest(f"{param} is empty", param=param)
            if len(token_ids) > context_tokens:
                raise ContextTooLong(
                    f"This model's maximum context length is {context_tokens} tokens. {param} has "
                    f"{len(token_ids)}",
                    param=param,
                )
        routing = caller.routing(routing)  # Before tokens are taken that nobody would give back.
        request = EmbeddingRequest(
            request_id=request_id,
            model=model,
            inputs=inputs,
            dimensions=options.dimensions,
            cache_salt=caller.cache_salt(options.cache_salt),
            priority=caller.priority(options.priority),
            reservation=caller.reserve(sum(map(len, inputs))),
            traceparent=traceparent if tracing.is_valid(traceparent) else "",
            trace_sample_ratio=self.settings.trace_sample_ratio,
            routing=routing,
            max_parallel_inputs=self.settings.max_parallel_inputs,
            accepted_at=accepted_at,
            deadline=deadline,
        )
        return Embedding(request, self.sessions, self._policy, self.metrics)

    async def texts(
        self, model: ServedModel, token_ids: list[int], *, keeps_special_tokens: bool
    ) -> list[str]:
        """What each token of a prompt adds to its text."""
        detokenizer = model.tokenizer.detokenizer((), keeps_special_tokens=keeps_special_tokens)

        def add_all() -> list[str]:
            return [detokenizer.add((token_id,)) for token_id in token_ids]

        if len(token_ids) > LONG_ECHO_TOKENS:
            return await asyncio.to_thread(add_all)
        return add_all()

    async def detokenise(self, model: ServedModel, token_ids: list[int]) -> str:
        """The text of tokens, special ones included. Raises InvalidRequest for unknown ones."""
        tokenizer = model.tokenizer
        checked = _checked(token_ids, tokenizer.vocabulary_tokens, param="tokens")
        if len(checked) > LONG_PROMPT_TOKENS:
            return await asyncio.to_thread(tokenizer.decode, checked)
        return tokenizer.decode(checked)

    def only_model(self, caller: Caller) -> str:
        """The name of the one model that the caller may use, for requests that name none.

        Raises InvalidRequest when there is none or more than one.
        """
        names = [
            model.name
            for model in self.models.served()
            if caller.may_use(model.name, *model.facts.aliases)
        ]
        if len(names) != 1:
            raise InvalidRequest(
                f"model is missing, and not exactly one but {len(names)} can be used",
                param="model",
            )
        return names[0]

    def start(
        self,
        request_id: str,
        model: ServedModel,
        prompt: list[int],
        options: GenerationOptions,
        *,
        caller: Caller,
        traceparent: str,
        routing: routing_pb2.RoutingOptions | None = None,
        accepted_at: float,
        deadline: float,
    ) -> Completion:
        """A completion to read; nothing is sent before that.

        Raises InvalidRequest, or ContextTooLong, for what does not fit the model, TokensLimited
        when the caller has not enough left for the prompt and max_tokens, and RoutingNotAllowed.
        """
        if not prompt:
            raise InvalidRequest("the prompt is empty", param=options.prompt_param)
        context_tokens = model.facts.context_length_tokens
        room_tokens = context_tokens - len(prompt)
        max_tokens = room_tokens if options.max_tokens is None else options.max_tokens
        if room_tokens < max(1, max_tokens):
            asked = f" and {max_tokens} output tokens" if room_tokens >= 1 else ""
            raise ContextTooLong(
                f"This model's maximum context length is {context_tokens} tokens. You asked for "
                f"{len(prompt)} prompt tokens{asked}",
                param=options.max_tokens_param if room_tokens >= 1 else options.prompt_param,
            )
        if options.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must not exceed the {max_tokens} output tokens at most",
                param="min_tokens",
            )
        _check_tokens(options.stop_token_ids, model, "stop_token_ids")
        _check_tokens(options.sampling.logit_bias, model, "logit_bias")
        routing = caller.routing(routing)  # Before tokens are taken that nobody would give back.
        reservation = caller.reserve(len(prompt) + (options.max_tokens or 0))
        trace = request_trace.begin(
            request_id,
            model.name,
            len(prompt),
            traceparent=traceparent,
            ratio=self.settings.trace_sample_ratio,
            accepted_at=accepted_at,
        )
        if trace is not None:
            traceparent = trace.traceparent
        request = TextRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            min_tokens=options.min_tokens,
            ignore_eos=options.ignore_eos,
            stop_token_ids=options.stop_token_ids,
            stop_strings=options.stop_strings,
            includes_stop=options.includes_stop,
            keeps_special_tokens=options.keeps_special_tokens,
            marks=options.marks,
            sampling=options.sampling,
            logprobs=options.logprobs,
            cache_salt=caller.cache_salt(options.cache_salt),
            priority=caller.priority(options.priority),
            reservation=reservation,
            traceparent=traceparent if tracing.is_valid(traceparent) else "",
            trace=trace,
            routing=routing,
            accepted_at=accepted_at,
            deadline=deadline,
        )
        return Completion(request, self.sessions, self._policy, self.metrics)


def new_request_id(prefix: str) -> str:
    """A unique name for a request, such as chatcmpl-...

    It can't be guessed from others: who knows a response's reads the conversation, where responses
    are kept and no API keys are asked for.
    """
    return f"{prefix}-{os.urandom(16).hex()}"


async def _near_or_far(
    encode: Callable[[PromptT], list[int]], prompt: PromptT, characters: int
) -> list[int]:
    if characters > LONG_PROMPT_CHARACTERS:
        return await asyncio.to_thread(encode, prompt)
    return encode(prompt)


def _checked(token_ids: list[int], vocabulary_tokens: int, param: str = "prompt") -> list[int]:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary_tokens):
        raise InvalidRequest(f"token ids must be in 0 to {vocabulary_tokens - 1}", param=param)
    return token_ids


def _check_tokens(token_ids: Collection[int], model: ServedModel, param: str) -> None:
    if token_ids and max(token_ids) >= model.tokenizer.vocabulary_tokens:
        last = model.tokenizer.vocabulary_tokens - 1
        raise InvalidRequest(f"{param}: token ids must be in 0 to {last}", param=param)
