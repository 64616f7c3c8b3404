"""Between messages and the engine's plain data, with the checks on what a client may ask. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from libs.common import grpc_errors, hashing
from libs.common.errors import (
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    TaskNotSupported,
)
from libs.engine.interface import (
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    KvSession,
    Language,
    Leg,
    LogprobOptions,
    OutputConstraint,
    PoolingOptions,
    PoolingTask,
    RequestKey,
    Sampling,
)
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.worker.v1 import worker_pb2

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: generation_pb2.FINISH_REASON_ERROR,
}
_LEGS = {
    worker_pb2.LEG_PREFILL: Leg.PREFILL,
    worker_pb2.LEG_DECODE: Leg.DECODE,
    worker_pb2.LEG_WHOLE: Leg.WHOLE,
}
_POOLING_TASKS = {PoolingTask.EMBED: generation_pb2.POOLING_TASK_EMBED}
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 1e6),
}

MAX_ALTERNATIVES = 20
"""Log probabilities for each token, beside its own."""
MAX_PROMPT_CANDIDATES = 1 << 20
"""Log probabilities of one prompt, all its tokens together: they go into one message."""
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
MAX_CONSTRAINT_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What this worker serves."""

    model: str
    engine: EngineInfo
    legs: frozenset[Leg]


def finish_reason(reason: FinishReason) -> generation_pb2.FinishReason.ValueType:
    return _FINISH_REASONS[reason]


def pooling_task(task: PoolingTask) -> generation_pb2.PoolingTask.ValueType:
    return _POOLING_TASKS[task]


def load_to_message(load: EngineLoad) -> outputs_pb2.WorkerLoad:
    return outputs_pb2.WorkerLoad(
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        queued_prefill_tokens=load.queued_prefill_tokens,
        active_kv_blocks=load.active_kv_blocks,
        total_kv_blocks=load.total_kv_blocks,
    )


def kv_session_to_message(session: KvSession) -> generation_pb2.KvSessionRef:
    return generation_pb2.KvSessionRef(
        session_id=session.session_id,
        transfer_backend=session.transfer_backend,
        endpoints=session.endpoints,
        attributes=session.attributes,
        time_to_live=grpc_errors.duration_of(session.time_to_live_seconds),
        last_sequence_hash=session.last_sequence_hash,
        tokens=session.tokens,
    )


def kv_session_from_message(message: generation_pb2.KvSessionRef) -> KvSession:
    return KvSession(
        session_id=message.session_id,
        transfer_backend=message.transfer_backend,
        endpoints=tuple(message.endpoints),
        attributes=message.attributes,
        time_to_live_seconds=grpc_errors.seconds_of(message.time_to_live),
        last_sequence_hash=message.last_sequence_hash,
        tokens=message.tokens,
    )


def engine_request(submit: worker_pb2.Submit, key: RequestKey, limits: Limits) -> EngineRequest:
    """What the engine is to run. Raises InvalidRequest, ContextTooLong, ModelNotFound or
    TaskNotSupported, each naming the field that is wrong."""
    try:
        generation = generation_pb2.Generation.FromString(submit.generation)
    except DecodeError as error:
        raise InvalidRequest(f"generation can't be parsed: {error}") from error
    leg = _LEGS.get(submit.leg)
    if leg not in limits.legs:
        # One of a newer client has no name here.
        known = submit.leg in worker_pb2.Leg.values()
        name = worker_pb2.Leg.Name(submit.leg) if known else submit.leg
        raise InvalidRequest(f"leg {name} is not for this worker", param="leg")
    if generation.model != limits.model:
        raise ModelNotFound(
            f"model {generation.model!r} is not served here; {limits.model!r} is", param="model"
        )
    if not generation.request_id:
        raise InvalidRequest("request_id must not be empty", param="request_id")
    prompt = generation.token_ids[:]
    if not prompt:
        raise InvalidRequest("token_ids must not be empty", param="token_ids")
    pooling = _pooling(generation, limits)
    room = limits.engine.context_length_tokens - len(prompt)
    if room < 0 and pooling is not None:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens; that exceeds the context of "
            f"{limits.engine.context_length_tokens}",
            param="token_ids",
        )
    if room < 1 and pooling is None:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens; with at least one of output that exceeds the "
            f"context of {limits.engine.context_length_tokens}",
            param="token_ids",
        )
    stopping = generation.stopping
    if leg is not Leg.PREFILL and stopping.max_tokens < 1 and pooling is None:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    kv_session = None
    if leg is Leg.DECODE and submit.HasField("kv_session"):
        kv_session = kv_session_from_message(submit.kv_session)
    salt = generation.kv.cache_salt
    last_hash = 0
    if leg is Leg.PREFILL or kv_session is not None:
        size = limits.engine.block_size_tokens
        hashes = hashing.sequence_hashes(prompt, size, cache_salt=salt)
        last_hash = hashes[-1] if hashes else 0
    return EngineRequest(
        key=key,
        request_id=generation.request_id,
        prompt=prompt,
        last_sequence_hash=last_hash,
        leg=leg,
        max_tokens=min(stopping.max_tokens, room) if leg is not Leg.PREFILL else 1,
        min_tokens=min(stopping.min_tokens, stopping.max_tokens),
        ignore_eos=stopping.ignore_eos,
        stop_token_ids=tuple(stopping.stop_token_ids),
        sampling=_sampling(generation.sampling),
        cache_salt=salt,
        logprobs=_logprobs(generation) if generation.HasField("logprobs") else None,
        priority=generation.priority,
        produced_tokens=min(generation.produced_tokens, len(prompt)),
        kv_session=kv_session,
        pooling=pooling,
        traceparent=submit.traceparent or generation.traceparent,
    )


def _pooling(generation: generation_pb2.Generation, limits: Limits) -> PoolingOptions | None:
    tasks = limits.engine.pooling_tasks
    if not generation.HasField("pooling"):
        if tasks:
            raise TaskNotSupported(f"model {limits.model!r} does not generate here", param="model")
        return None
    options = generation.pooling
    found = [task for task in tasks if pooling_task(task) == options.task]
    if not found:
        known = options.task in generation_pb2.PoolingTask.values()
        name = generation_pb2.PoolingTask.Name(options.task) if known else options.task
        raise TaskNotSupported(f"model {limits.model!r} has no task {name} here", param="model")
    dimensions = options.dimensions if options.HasField("dimensions") else None
    if dimensions == 0:
        raise InvalidRequest("dimensions must be at least 1", param="dimensions")
    return PoolingOptions(found[0], dimensions)


def _logprobs(generation: generation_pb2.Generation) -> LogprobOptions:
    options = generation.logprobs
    found: dict[str, int | None] = {"output_alternatives": None, "prompt_alternatives": None}
    for field, value in options.ListFields():
        if value > MAX_ALTERNATIVES:
            raise InvalidRequest(
                f"{field.name} must be at most {MAX_ALTERNATIVES}, got {value}",
                param=f"logprobs.{field.name}",
            )
        found[field.name] = value
    asked = found["prompt_alternatives"]
    prompt_tokens = len(generation.token_ids)
    if asked is not None and (asked + 1) * prompt_tokens > MAX_PROMPT_CANDIDATES:
        raise InvalidRequest(
            f"{asked} alternatives for each of {prompt_tokens} prompt tokens are too many",
            param="logprobs.prompt_alternatives",
        )
    return LogprobOptions(**found)


def _sampling(options: generation_pb2.SamplingOptions) -> Sampling:
    given: dict[str, Any] = {field.name: value for field, value in options.ListFields()}
    for name in given.keys() & _RANGES.keys():
        (low, high), value = _RANGES[name], given[name]
        if not low <= value <= high:
            raise InvalidRequest(
                f"{name} must be from {low:g} to {high:g}, got {value}", param=name
            )
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(options)
    if "constraint" in given:
        given["constraint"] = _constraint(options.constraint)
    return Sampling(**given)


def _logit_bias(options: generation_pb2.SamplingOptions) -> dict[int, float]:
    biases = dict(options.logit_bias)
    if len(biases) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            f"logit_bias takes at most {MAX_BIASED_TOKENS} tokens, got {len(biases)}",
            param="logit_bias",
        )
    for token, bias in biases.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequest(
                f"logit_bias of token {token} must be from -100 to 100, got {bias}",
                param="logit_bias",
            )
    return biases


def _constraint(message: generation_pb2.OutputConstraint) -> OutputConstraint:
    name = message.WhichOneof("language")
    if name is None or (name == "json_object" and not message.json_object):
        raise InvalidRequest("the constraint names no language", param="constraint")
    if message.ByteSize() > MAX_CONSTRAINT_BYTES:
        raise InvalidRequest(
            f"the constraint is larger than {MAX_CONSTRAINT_BYTES} bytes", param="constraint"
        )
    language = Language(name)
    match language:
        case Language.JSON_OBJECT:
            return OutputConstraint(language)
        case Language.CHOICES:
            texts = tuple(message.choices.texts)
            if not texts or not all(texts):
                raise InvalidRequest("choices must be texts, none empty", param="constraint")
            return OutputConstraint(language, choices=texts)
        case _:
            return OutputConstraint(language, definition=getattr(message, name))
