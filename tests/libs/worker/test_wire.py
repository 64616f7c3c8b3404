from __future__ import annotations

from dataclasses import replace

import pytest

from libs.common.errors import (
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    SwitchgearError,
    TaskNotSupported,
)
from libs.common.hashing import sequence_hashes
from libs.engine.interface import (
    EngineInfo,
    EngineRequest,
    KvSession,
    Language,
    Leg,
    LogprobOptions,
    OutputConstraint,
    PoolingOptions,
    PoolingTask,
    RequestKey,
)
from libs.worker.core import wire
from switchgear.common.v1 import generation_pb2
from switchgear.worker.v1 import worker_pb2

INFO = EngineInfo(
    block_size_tokens=4,
    total_kv_blocks=100,
    context_length_tokens=20,
    max_running_requests=8,
    transfer_backend="sim",
    publishes_kv_events=True,
)
LIMITS = wire.Limits("m", INFO, frozenset({Leg.DECODE, Leg.WHOLE}))
SESSION = KvSession(
    session_id="s",
    transfer_backend="sim",
    endpoints=("127.0.0.1:1",),
    attributes=b"{}",
    time_to_live_seconds=2.5,
    last_sequence_hash=2**64 - 1,
    tokens=9,
)


def generation(**changes: object) -> generation_pb2.Generation:
    made = generation_pb2.Generation(
        request_id="r",
        model="m",
        token_ids=range(9),
        stopping=generation_pb2.StoppingOptions(max_tokens=5),
    )
    made.MergeFrom(generation_pb2.Generation(**changes))  # type: ignore[arg-type]
    return made


def parse(
    made: generation_pb2.Generation, leg: worker_pb2.Leg.ValueType = worker_pb2.LEG_WHOLE
) -> EngineRequest:
    submit = worker_pb2.Submit(handle=1, generation=made.SerializeToString(), leg=leg)
    return wire.engine_request(submit, RequestKey(1), LIMITS)


def test_absent_sampling_fields_stay_absent_and_zero_stays_zero() -> None:
    sampling = parse(generation(sampling=generation_pb2.SamplingOptions(temperature=0))).sampling
    assert sampling.temperature == 0
    assert sampling.top_p is None
    assert sampling.seed is None


def test_everything_about_output_arrives() -> None:
    asked = parse(
        generation(
            sampling=generation_pb2.SamplingOptions(
                logit_bias={3: -100.0},
                constraint=generation_pb2.OutputConstraint(
                    choices=generation_pb2.Choices(texts=["a", "b"])
                ),
            ),
            logprobs=generation_pb2.LogprobOptions(output_alternatives=0),
            priority=-3,
            produced_tokens=2,
        )
    )
    assert asked.sampling.logit_bias == {3: -100.0}
    assert asked.sampling.constraint == OutputConstraint(Language.CHOICES, choices=("a", "b"))
    assert asked.logprobs == LogprobOptions(output_alternatives=0)
    assert (asked.priority, asked.produced_tokens) == (-3, 2)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": {"output_alternatives": 21}}, "logprobs.output_alternatives"),
        ({"logprobs": {"prompt_alternatives": 21}}, "logprobs.prompt_alternatives"),
        ({"sampling": {"logit_bias": {3: 101.0}}}, "logit_bias"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}}, "logit_bias"),
        ({"sampling": {"constraint": {}}}, "constraint"),
        ({"sampling": {"constraint": {"json_object": False}}}, "constraint"),
        ({"sampling": {"constraint": {"choices": {"texts": []}}}}, "constraint"),
        ({"sampling": {"constraint": {"choices": {"texts": ["a", ""]}}}}, "constraint"),
        ({"sampling": {"constraint": {"regex": "a" * (256 << 10)}}}, "constraint"),
    ],
)
def test_what_is_asked_of_output_is_checked(changes: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(generation(**changes))
    assert refused.value.param == param


def test_output_is_capped_by_the_context() -> None:
    stopping = generation_pb2.StoppingOptions(max_tokens=1000)
    assert parse(generation(stopping=stopping)).max_tokens == 11


def test_a_kv_session_crosses_the_wire_intact() -> None:
    message = wire.kv_session_to_message(SESSION)
    assert wire.kv_session_from_message(message) == SESSION


def test_a_request_to_pull_knows_its_own_last_hash() -> None:
    submit = worker_pb2.Submit(
        handle=1,
        generation=generation().SerializeToString(),
        leg=worker_pb2.LEG_DECODE,
        kv_session=wire.kv_session_to_message(SESSION),
    )
    request = wire.engine_request(submit, RequestKey(1), LIMITS)
    assert request.kv_session == SESSION
    assert request.last_sequence_hash == sequence_hashes(range(9), 4)[-1]


@pytest.mark.parametrize(
    ("made", "error", "param"),
    [
        (generation(model="other"), ModelNotFound, "model"),
        (generation(token_ids=range(11)), ContextTooLong, "token_ids"),
        (
            generation_pb2.Generation(request_id="r", model="m"),
            InvalidRequest,
            "token_ids",
        ),
        (generation_pb2.Generation(model="m", token_ids=[1]), InvalidRequest, "request_id"),
        (
            generation_pb2.Generation(request_id="r", model="m", token_ids=[1]),
            InvalidRequest,
            "max_tokens",
        ),
        (
            generation(sampling=generation_pb2.SamplingOptions(temperature=9)),
            InvalidRequest,
            "temperature",
        ),
        (generation(sampling=generation_pb2.SamplingOptions(top_p=0)), InvalidRequest, "top_p"),
    ],
)
def test_a_bad_request_is_refused_by_field(
    made: generation_pb2.Generation, error: type[SwitchgearError], param: str
) -> None:
    with pytest.raises(error) as caught:
        parse(made)
    assert caught.value.param == param


def test_a_leg_that_is_not_this_workers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="LEG_PREFILL"):
        parse(generation(), worker_pb2.LEG_PREFILL)
    with pytest.raises(InvalidRequest, match="LEG_UNSPECIFIED"):
        parse(generation(), worker_pb2.LEG_UNSPECIFIED)


def test_a_leg_of_a_newer_client_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="leg 99"):
        parse(generation(), 99)  # type: ignore[arg-type]


def test_bytes_that_are_no_generation_are_refused() -> None:
    submit = worker_pb2.Submit(handle=1, generation=b"\xff\xff", leg=worker_pb2.LEG_WHOLE)
    with pytest.raises(InvalidRequest, match="generation"):
        wire.engine_request(submit, RequestKey(1), LIMITS)


EMBEDDING = wire.Limits("m", replace(INFO, pooling_tasks=(PoolingTask.EMBED,)), LIMITS.legs)


def parse_pooling(limits: wire.Limits, **changes: object) -> EngineRequest:
    made = generation_pb2.Generation(request_id="r", model="m", token_ids=range(9))
    made.MergeFrom(generation_pb2.Generation(**changes))  # type: ignore[arg-type]
    submit = worker_pb2.Submit(
        handle=1, generation=made.SerializeToString(), leg=worker_pb2.LEG_WHOLE
    )
    return wire.engine_request(submit, RequestKey(1), limits)


def embed(**fields: int) -> generation_pb2.PoolingOptions:
    return generation_pb2.PoolingOptions(task=generation_pb2.POOLING_TASK_EMBED, **fields)


def test_a_prompt_to_embed_needs_no_room_for_output() -> None:
    request = parse_pooling(EMBEDDING, pooling=embed(), token_ids=range(11))
    assert len(request.prompt) == INFO.context_length_tokens
    assert request.pooling == PoolingOptions(PoolingTask.EMBED)
    asked = parse_pooling(EMBEDDING, pooling=embed(dimensions=8)).pooling
    assert asked == PoolingOptions(PoolingTask.EMBED, 8)


@pytest.mark.parametrize(
    ("limits", "changes", "error", "param"),
    [
        (LIMITS, {"pooling": embed()}, TaskNotSupported, "model"),
        (EMBEDDING, {}, TaskNotSupported, "model"),
        (EMBEDDING, {"pooling": generation_pb2.PoolingOptions()}, TaskNotSupported, "model"),
        (
            EMBEDDING,
            {"pooling": generation_pb2.PoolingOptions(task=99)},  # type: ignore[arg-type]
            TaskNotSupported,
            "model",
        ),
        (EMBEDDING, {"pooling": embed(dimensions=0)}, InvalidRequest, "dimensions"),
        (EMBEDDING, {"pooling": embed(), "token_ids": range(12)}, ContextTooLong, "token_ids"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(
    limits: wire.Limits, changes: dict[str, object], error: type[SwitchgearError], param: str
) -> None:
    with pytest.raises(error) as raised:
        parse_pooling(limits, **changes)
    assert (type(raised.value), raised.value.param) == (error, param)
