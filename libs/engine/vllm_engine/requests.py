"""Requests, sessions and pulls in vLLM's terms. No I/O or clock in here."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from libs.common.errors import TransferFailed
from libs.engine.interface import (
    EngineRequest,
    KvSession,
    Language,
    Logprobs,
    OutputConstraint,
    PoolingOptions,
    RequestKey,
    Sampling,
)

TRANSFER_BACKEND = "nixl"

PULL_DEADLINE = "switchgear_pull_deadline"
"""Key in vLLM's transfer parameters: when a pull may begin at the latest, in CLOCK_MONOTONIC
seconds, which all processes of a host share. See `connector`."""

RELEASE = "switchgear_release"
"""Key in vLLM's transfer parameters: vLLM's id of a prefilled request whose KV nobody wants any
more. See `connector`."""

PRODUCED_TOKENS = "switchgear_produced_tokens"
"""Key in vLLM's extra arguments: how many of the prompt's last tokens are output of an earlier
worker. See `grammars`."""

KEEP_FOR_PULL: Mapping[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""vLLM's transfer parameters of a prefill leg."""


_PULLED_FROM = frozenset(
    ("remote_engine_id", "remote_request_id", "remote_block_ids", "remote_host", "remote_port")
)
"""Transfer parameters without which vLLM can't pull."""


class _Attributes(msgspec.Struct, frozen=True):
    """KvSession.attributes: what a decode engine needs beyond the session's own fields."""

    prompt_hash: str
    """Of all the prompt's tokens: the session's own hash leaves out the last, partial block."""
    vllm: dict[str, Any]
    """vLLM's transfer parameters, as the prefill engine returned them."""


def prompt_hash(prompt: Sequence[int]) -> str:
    """XXH3-64 of the token ids as little-endian u32."""
    words = array("I", prompt)
    if sys.byteorder == "big":
        words.byteswap()
    return f"{xxh3_64_intdigest(words.tobytes()):016x}"


def session_of(
    request: EngineRequest, transfer_params: dict[str, Any], time_to_live_seconds: float
) -> KvSession:
    """The session of a computed prompt, from what vLLM returned for it."""
    return KvSession(
        session_id=transfer_params["remote_request_id"],
        transfer_backend=TRANSFER_BACKEND,
        endpoints=(f"{transfer_params['remote_host']}:{transfer_params['remote_port']}",),
        attributes=msgspec.json.encode(
            _Attributes(prompt_hash=prompt_hash(request.prompt), vllm=transfer_params)
        ),
        time_to_live_seconds=time_to_live_seconds,
        last_sequence_hash=request.last_sequence_hash,
        tokens=len(request.prompt),
    )


def pull_params(request: EngineRequest, session: KvSession, now_seconds: float) -> dict[str, Any]:
    """vLLM's transfer parameters for pulling the session's KV.

    Raises TransferFailed when the session is over or is not of this very prompt: vLLM itself
    would pull whatever the blocks hold.
    """
    if session.transfer_backend != TRANSFER_BACKEND:
        raise TransferFailed(f"cannot pull over {session.transfer_backend!r}")
    if session.time_to_live_seconds <= 0:
        raise TransferFailed("the KV session is over")
    try:
        attributes = msgspec.json.decode(session.attributes, type=_Attributes)
    except msgspec.DecodeError as error:
        raise TransferFailed(f"malformed KV session attributes: {error}") from error
    if missing := _PULLED_FROM - attributes.vllm.keys():
        raise TransferFailed(f"malformed KV session attributes: no {', '.join(sorted(missing))}")
    if (
        session.last_sequence_hash != request.last_sequence_hash
        or session.tokens != len(request.prompt)
        or attributes.prompt_hash != prompt_hash(request.prompt)
    ):
        raise TransferFailed("the KV session is of another prompt")
    return {**attributes.vllm, PULL_DEADLINE: now_seconds + session.time_to_live_seconds}


def sampling_arguments(request: EngineRequest, pull: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for a whole request, or with a pull for a decode leg.

    Those of StructuredOutputsParams are in a dictionary under `structured_outputs`.
    """
    extra: dict[str, Any] = {} if pull is None else {"kv_transfer_params": pull}
    arguments: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": list(request.stop_token_ids),
        **_given(request.sampling),
    }
    if bias := _logit_bias(request):
        arguments["logit_bias"] = bias
    if request.sampling.constraint is not None:
        arguments["structured_outputs"] = _constraint(request.sampling.constraint)
        if request.produced_tokens:
            extra[PRODUCED_TOKENS] = request.produced_tokens
    if request.logprobs is not None:
        arguments["logprobs"] = request.logprobs.output_alternatives
        arguments["prompt_logprobs"] = request.logprobs.prompt_alternatives
    return {"extra_args": extra or None, **arguments}


def prefill_arguments() -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for the prefill leg, whose one token is thrown away."""
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "extra_args": {"kv_transfer_params": dict(KEEP_FOR_PULL)},
    }


def pooling_arguments(pooling: PoolingOptions) -> dict[str, Any]:
    """Arguments of vLLM's PoolingParams."""
    return {"task": pooling.task.name.lower(), "dimensions": pooling.dimensions}


def _given(sampling: Sampling) -> dict[str, Any]:
    fields = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    return {name: value for name in fields if (value := getattr(sampling, name)) is not None}


def _logit_bias(request: EngineRequest) -> dict[int, float]:
    """The request's own biases, less what tokens of an earlier worker cost.

    To vLLM those tokens are prompt, which presence and frequency penalties leave alone. A bias
    does the same to a logit, with two differences: a token that comes again here pays the presence
    penalty twice, and a repetition penalty scales what the bias has taken away.
    """
    sampling = request.sampling
    biases = dict(sampling.logit_bias)
    presence = sampling.presence_penalty or 0.0
    frequency = sampling.frequency_penalty or 0.0
    if request.produced_tokens and (presence or frequency):
        for token, count in Counter(request.prompt[-request.produced_tokens :]).items():
            biases[token] = biases.get(token, 0.0) - presence - frequency * count
    return biases


def _constraint(constraint: OutputConstraint) -> dict[str, Any]:
    match constraint.language:
        case Language.JSON_SCHEMA:
            return {"json": constraint.definition}
        case Language.JSON_OBJECT:
            return {"json_object": True}
        case Language.REGEX:
            return {"regex": constraint.definition}
        case Language.CHOICES:
            return {"choice": list(constraint.choices)}
        case Language.GRAMMAR:
            return {"grammar": constraint.definition}


def logprobs_of(key: RequestKey, columns: Any, alternatives: int) -> Logprobs:
    """From vLLM's LogprobsLists or LogprobsTensors, whose rows are as long as the longest row that
    any request of the batch asked for."""
    width = alternatives + 1
    return Logprobs(
        key,
        width,
        columns.logprob_token_ids[:, :width].flatten().tolist(),
        columns.logprobs[:, :width].flatten().tolist(),
    )


def pooled_values(tensor: Any) -> bytes:
    """A vector of vLLM's, of whatever precision, as 32-bit floats, little-endian."""
    values: bytes = tensor.float().numpy().astype("<f4").tobytes()
    return values
