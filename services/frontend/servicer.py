"""The public gRPC API, on the same pipeline as the REST API."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypedDict

import grpc

from libs.common.errors import InvalidRequest, SwitchgearError
from services.frontend.access import ANYONE, Caller
from services.frontend.chat_template import Chat
from services.frontend.completion import Completion, running
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.embedding import MAX_INPUTS, floats_of
from services.frontend.models import ServedModel
from services.frontend.pipeline import (
    EmbeddingOptions,
    GenerationOptions,
    Pipeline,
    Prompt,
    new_request_id,
)
from services.frontend.watch import Watch
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import InferenceServiceServicer

MAX_STOP_STRINGS = 16

TURN_BYTES = 64 << 10
"""Of vectors become part of an answer at a time, in half a millisecond; then others get their
turn."""

_ABOVE_ZERO = math.ulp(0.0)
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (_ABOVE_ZERO, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (_ABOVE_ZERO, 100.0),
}


_Request: TypeAlias = (
    inference_pb2.GenerateRequest
    | inference_pb2.EmbedRequest
    | inference_pb2.TokenizeRequest
    | inference_pb2.DetokenizeRequest
)


class _Origin(TypedDict):
    """Where a call comes from and how long it may take, as the pipeline is told of it."""

    caller: Caller
    traceparent: str
    accepted_at: float
    deadline: float


class InferenceServicer(InferenceServiceServicer):
    """Parses, runs, answers."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @contextmanager
    def _running(
        self, endpoint: str, request: _Request, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[tuple[ServedModel, _Origin]]:
        """The model that a call is for, and where it comes from; while the body runs the call is
        counted, has a place, and ends at its deadline.

        Raises what `Pipeline.admitted` and `Pipeline.model_for` do, and Unauthenticated.
        """
        pipeline = self._pipeline
        accepted_at = asyncio.get_running_loop().time()
        limit_seconds = pipeline.settings.request_timeout_seconds
        left_seconds = context.time_remaining() or limit_seconds
        deadline = accepted_at + min(limit_seconds, left_seconds)
        with self._counted(endpoint, request.model):
            caller = _caller(pipeline, context)
            with pipeline.admitted(caller), Watch(deadline):
                origin = _Origin(
                    caller=caller,
                    traceparent=_metadata(context, "traceparent"),
                    accepted_at=accepted_at,
                    deadline=deadline,
                )
                yield pipeline.model_for(caller, request.model), origin

    @contextmanager
    def _counted(self, endpoint: str, asked_model: str) -> Iterator[None]:
        status = grpc.StatusCode.CANCELLED
        try:
            yield
            status = grpc.StatusCode.OK
        except Exception as error:
            status = error.code if isinstance(error, SwitchgearError) else grpc.StatusCode.INTERNAL
            raise
        finally:
            metrics = self._pipeline.metrics
            model = self._pipeline.models.canonical_name(asked_model)
            metrics.requests.labels(model, endpoint, status.name).inc()
            if status is grpc.StatusCode.CANCELLED:
                metrics.disconnects.inc()

    async def Generate(  # type: ignore[override]
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[
            inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
        ],
    ) -> None:
        pipeline = self._pipeline
        with self._running("generate", request, context) as (model, origin):
            model.check_generates()
            options = _options(request)
            completion = pipeline.start(
                new_request_id("gen"),
                model,
                await pipeline.tokenise(model, _prompt(request)),
                options,
                routing=request.routing if request.HasField("routing") else None,
                **origin,
            )
            with running(completion, pipeline.metrics):
                await _write(completion, request, context)

    async def Embed(
        self,
        request: inference_pb2.EmbedRequest,
        context: grpc.aio.ServicerContext[inference_pb2.EmbedRequest, inference_pb2.EmbedResponse],
    ) -> inference_pb2.EmbedResponse:
        pipeline = self._pipeline
        with self._running("embed", request, context) as (model, origin):
            model.check_embeds()
            inputs, options = _inputs(request), _embedding_options(request)
            embedding = pipeline.start_embedding(
                new_request_id("embd"),
                model,
                await pipeline.tokenise_inputs(model, inputs, options),
                options,
                routing=request.routing if request.HasField("routing") else None,
                **origin,
            )
            response = await _with_vectors(await embedding.run())
            response.usage.prompt_tokens = embedding.prompt_tokens
            response.usage.cached_tokens = embedding.cached_tokens
            return response

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[
            inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse
        ],
    ) -> inference_pb2.ListModelsResponse:
        caller = _caller(self._pipeline, context)
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    model=model.name,
                    context_length_tokens=model.facts.context_length_tokens,
                    pooling_tasks=model.facts.pooling_tasks,
                )
                for model in self._pipeline.models.served()
                if caller.may_use(model.name, *model.facts.aliases)
            ]
        )

    async def Tokenize(
        self,
        request: inference_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[
            inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse
        ],
    ) -> inference_pb2.TokenizeResponse:
        with self._running("tokenize", request, context) as (model, _):
            token_ids = await self._pipeline.tokenise(
                model,
                _prompt(request, begins_answer=not request.omit_answer_opening),
                adds_special_tokens=not request.omit_special_tokens,
            )
            return inference_pb2.TokenizeResponse(
                token_ids=token_ids, context_length_tokens=model.facts.context_length_tokens
            )

    async def Detokenize(
        self,
        request: inference_pb2.DetokenizeRequest,
        context: grpc.aio.ServicerContext[
            inference_pb2.DetokenizeRequest, inference_pb2.DetokenizeResponse
        ],
    ) -> inference_pb2.DetokenizeResponse:
        with self._running("detokenize", request, context) as (model, _):
            text = await self._pipeline.detokenise(model, list(request.token_ids))
            return inference_pb2.DetokenizeResponse(text=text)


async def _write(
    completion: Completion,
    request: inference_pb2.GenerateRequest,
    context: grpc.aio.ServicerContext[
        inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
    ],
) -> None:
    """Writes the answer as it comes; its last message says how it ended."""
    is_first = True
    while not completion.is_finished:
        response = inference_pb2.GenerateResponse(text=await completion.read())
        if request.HasField("logprobs"):
            _add_logprobs(response, completion, is_first=is_first)
        is_first = False
        if not completion.is_finished and response.ByteSize():
            await context.write(response)
    response.finish_reason = completion.finish_reason
    response.usage.prompt_tokens = completion.prompt_tokens
    response.usage.completion_tokens = completion.completion_tokens
    response.usage.cached_tokens = completion.cached_tokens
    await context.write(response)


def _prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
    *,
    begins_answer: bool = True,
) -> Prompt:
    match request.WhichOneof("prompt"):
        case "messages":
            return Chat(
                [
                    {"role": message.role, "content": message.content}
                    for message in request.messages.messages
                ],
                begins_answer=begins_answer,
            )
        case "text":
            return request.text
        case "token_ids":
            assert isinstance(request, inference_pb2.GenerateRequest)
            return list(request.token_ids.token_ids)
        case _:
            raise InvalidRequest("prompt is missing", param="prompt")


def _inputs(request: inference_pb2.EmbedRequest) -> list[Prompt]:
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidRequest(
            f"inputs must be 1 to {MAX_INPUTS}, got {len(request.inputs)}", param="inputs"
        )
    return [
        one.text if one.WhichOneof("input") == "text" else list(one.token_ids.token_ids)
        for one in request.inputs
    ]


async def _with_vectors(vectors: Sequence[bytes]) -> inference_pb2.EmbedResponse:
    response = inference_pb2.EmbedResponse()
    added_bytes = 0
    for vector in vectors:
        response.embeddings.add(values=floats_of(vector))
        added_bytes += len(vector)
        if added_bytes >= TURN_BYTES:
            added_bytes = 0
            await asyncio.sleep(0)
    return response


def _embedding_options(request: inference_pb2.EmbedRequest) -> EmbeddingOptions:
    for name in ("dimensions", "truncate_tokens"):
        if request.HasField(name) and not getattr(request, name):
            raise InvalidRequest(f"{name} must be at least 1", param=name)
    return EmbeddingOptions(
        input_param="inputs",
        dimensions=request.dimensions if request.HasField("dimensions") else None,
        truncate_tokens=request.truncate_tokens if request.HasField("truncate_tokens") else None,
        truncate_param="truncate_tokens",
        cache_salt=request.kv.cache_salt,
        priority=request.priority,
    )


def _options(request: inference_pb2.GenerateRequest) -> GenerationOptions:
    sampling, stopping = request.sampling, request.stopping
    for field, value in sampling.ListFields():
        if field.name not in _RANGES:
            continue
        least, most = _RANGES[field.name]
        if not least <= value <= most:
            raise InvalidRequest(
                f"sampling.{field.name} is {value}, not in {least:.3g} to {most:.3g}",
                param=f"sampling.{field.name}",
            )
    if len(request.stop) > MAX_STOP_STRINGS or not all(request.stop):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty", param="stop"
        )
    return GenerationOptions(
        max_tokens=stopping.max_tokens or None,
        max_tokens_param="stopping.max_tokens",
        min_tokens=stopping.min_tokens,
        ignore_eos=stopping.ignore_eos,
        stop_token_ids=list(stopping.stop_token_ids),
        stop_strings=list(request.stop),
        includes_stop=request.includes_stop,
        keeps_special_tokens=request.keeps_special_tokens,
        sampling=sampling,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        cache_salt=request.kv.cache_salt,
        priority=request.priority,
    )


def _add_logprobs(
    response: inference_pb2.GenerateResponse, completion: Completion, *, is_first: bool
) -> None:
    token_bytes = completion.request.model.tokenizer.token_bytes

    def candidate(token_id: int, logprob: float | None) -> inference_pb2.Candidate:
        return inference_pb2.Candidate(
            token_id=token_id, bytes=token_bytes(token_id), logprob=logprob
        )

    def message(token: TokenLogprobs) -> inference_pb2.TokenLogprobs:
        return inference_pb2.TokenLogprobs(
            token=candidate(token.token_id, token.logprob),
            alternatives=[candidate(*alternative) for alternative in token.alternatives],
        )

    response.logprobs.extend(map(message, completion.take_logprobs()))
    if is_first:
        response.prompt_logprobs.extend(map(message, completion.prompt_logprobs()))


def _caller(pipeline: Pipeline, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Raises Unauthenticated."""
    if pipeline.access.is_open:
        return ANYONE
    return pipeline.access.caller(_metadata(context, "authorization"))


def _metadata(context: grpc.aio.ServicerContext[Any, Any], wanted: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == wanted:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""
