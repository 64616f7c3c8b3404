from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.errors import TransferFailed
from libs.engine.interface import (
    EngineRequest,
    KvSession,
    Language,
    Leg,
    LogprobOptions,
    OutputConstraint,
    RequestKey,
    Sampling,
)
from libs.engine.vllm_engine import requests

TRANSFER_PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "engine",
    "remote_request_id": "1.0-abcdef01",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}


def request_of(prompt: list[int], **others: Any) -> EngineRequest:
    return EngineRequest(
        key=RequestKey(1),
        request_id="r1",
        prompt=prompt,
        leg=Leg.DECODE,
        **{"last_sequence_hash": 7, "max_tokens": 16, **others},
    )


def session(prompt: list[int]) -> KvSession:
    return requests.session_of(request_of(prompt), TRANSFER_PARAMS, 20.0)


def refusal(request: EngineRequest, offered: KvSession) -> str:
    with pytest.raises(TransferFailed) as refused:
        requests.pull_params(request, offered, 100.0)
    return refused.value.message


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_a_session_of_the_prompt_gives_vllm_its_parameters_back(prompt: list[int]) -> None:
    params = requests.pull_params(request_of(prompt), session(prompt), 100.0)
    assert params.pop(requests.PULL_DEADLINE) == 120.0
    assert params == TRANSFER_PARAMS


def test_a_session_says_where_its_kv_is() -> None:
    made = session([1, 2, 3])
    assert (made.session_id, made.endpoints) == ("1.0-abcdef01", ("10.0.0.1:5600",))
    assert (made.tokens, made.last_sequence_hash, made.time_to_live_seconds) == (3, 7, 20.0)


@pytest.mark.parametrize(
    "request_",
    [
        request_of([1, 2, 4]),
        request_of([1, 2]),
        request_of([1, 2, 3], last_sequence_hash=8),
    ],
    ids=["other partial block", "other length", "other full blocks"],
)
def test_a_session_of_another_prompt_is_refused(request_: EngineRequest) -> None:
    assert refusal(request_, session([1, 2, 3])) == "the KV session is of another prompt"


def test_a_session_that_is_over_is_refused() -> None:
    over = replace(session([1]), time_to_live_seconds=0.0)
    assert refusal(request_of([1]), over) == "the KV session is over"


def test_a_session_of_another_backend_is_refused() -> None:
    assert "cannot pull" in refusal(request_of([1]), replace(session([1]), transfer_backend="sim"))


def test_a_session_with_malformed_attributes_is_refused() -> None:
    assert "malformed" in refusal(request_of([1]), replace(session([1]), attributes=b"{}"))


def test_a_session_that_does_not_say_where_its_blocks_are_is_refused() -> None:
    params = {name: value for name, value in TRANSFER_PARAMS.items() if name != "remote_block_ids"}
    offered = requests.session_of(request_of([1]), params, 20.0)
    assert "no remote_block_ids" in refusal(request_of([1]), offered)


def test_what_a_request_leaves_open_is_left_to_vllm() -> None:
    assert requests.sampling_arguments(request_of([1]), None) == {
        "extra_args": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "ignore_eos": False,
        "stop_token_ids": [],
    }


def test_every_sampling_field_reaches_vllm() -> None:
    sampling = Sampling(
        temperature=0.0,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=0,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
    )
    asked = request_of([1], sampling=sampling, min_tokens=2, ignore_eos=True, stop_token_ids=(3, 4))
    arguments = requests.sampling_arguments(asked, {"remote_engine_id": "engine"})
    assert arguments == {
        "extra_args": {"kv_transfer_params": {"remote_engine_id": "engine"}},
        "max_tokens": 16,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 0,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (OutputConstraint(Language.JSON_SCHEMA, "{}"), {"json": "{}"}),
        (OutputConstraint(Language.JSON_OBJECT), {"json_object": True}),
        (OutputConstraint(Language.REGEX, "a+"), {"regex": "a+"}),
        (OutputConstraint(Language.CHOICES, choices=("a", "b")), {"choice": ["a", "b"]}),
        (OutputConstraint(Language.GRAMMAR, "root ::= [a]"), {"grammar": "root ::= [a]"}),
    ],
)
def test_a_constraint_goes_on_after_what_was_produced(
    constraint: OutputConstraint, expected: dict[str, Any]
) -> None:
    asked = request_of([1, 2, 3], sampling=Sampling(constraint=constraint), produced_tokens=2)
    arguments = requests.sampling_arguments(asked, None)
    assert arguments["structured_outputs"] == expected
    assert arguments["extra_args"] == {requests.PRODUCED_TOKENS: 2}


def test_penalties_count_what_was_produced_elsewhere() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=1.0, logit_bias={7: 3.0, 9: 1.0})
    asked = request_of([9, 8, 7, 8], sampling=sampling, produced_tokens=3)
    arguments = requests.sampling_arguments(asked, None)
    assert arguments["logit_bias"] == {7: 3.0 - 1.5, 8: -2.5, 9: 1.0}
    assert arguments["presence_penalty"] == 0.5


def test_log_probabilities_reach_vllm() -> None:
    arguments = requests.sampling_arguments(request_of([1], logprobs=LogprobOptions(3, 0)), None)
    assert (arguments["logprobs"], arguments["prompt_logprobs"]) == (3, 0)


def test_vllms_parameters_of_two_prefill_legs_are_not_shared() -> None:
    first, second = requests.prefill_arguments(), requests.prefill_arguments()
    first["extra_args"]["kv_transfer_params"]["do_remote_decode"] = False
    assert second["extra_args"]["kv_transfer_params"]["do_remote_decode"]
