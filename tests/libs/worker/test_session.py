from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.errors import Overloaded, ProtocolViolation
from libs.engine.interface import (
    EngineLoad,
    Finish,
    FinishReason,
    Logprobs,
    Pooled,
    RequestKey,
    Start,
)
from libs.worker.core.session import Session
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.worker.v1 import worker_pb2

LOAD = EngineLoad(1, 2, 3, 4, 5)


def nothing() -> None:
    pass


def load() -> EngineLoad:
    return LOAD


def outputs(response: worker_pb2.SessionResponse | None) -> outputs_pb2.StepOutputs:
    assert response is not None
    return outputs_pb2.StepOutputs.FromString(response.outputs)


def test_the_first_message_has_the_load_and_nothing_else() -> None:
    session = Session(nothing, 1)
    session.flush()
    response = session.take(load)
    assert response is not None
    assert response.load.queued_prefill_tokens == 3
    assert not response.outputs
    assert session.take(load) is None


def test_one_token_each_needs_no_counts() -> None:
    session = Session(nothing, 1)
    session.produced_one(1, 10)
    session.produced_one(2, 20)
    session.flush()
    sent = outputs(session.take(load))
    assert (list(sent.handles), list(sent.token_ids)) == ([1, 2], [10, 20])
    assert not sent.token_counts


def test_log_probabilities_of_merged_steps_stay_in_order() -> None:
    session = Session(nothing, 1)
    key = RequestKey(1)
    session.produced_one(1, 10)
    session.found_logprobs(1, Logprobs(key, 2, [10, 11], [-0.5, -1.0]))
    session.produced(1, [20, 30])
    session.found_logprobs(1, Logprobs(key, 1, [20, 30], [-2.0, -3.0]))
    session.found_prompt_logprobs(1, Logprobs(key, 1, [7], [-4.0]))
    session.flush()
    sent = outputs(session.take(load))
    assert list(sent.logprobs.handles) == [1, 1]
    assert list(sent.logprobs.position_counts) == [1, 2]
    assert list(sent.logprobs.candidate_counts) == [2, 1]
    assert list(sent.logprobs.token_ids) == [10, 11, 20, 30]
    assert list(sent.logprobs.logprobs) == [-0.5, -1.0, -2.0, -3.0]
    assert list(sent.prompt_logprobs.token_ids) == [7]
    session.flush()
    assert not outputs(session.take(load) or worker_pb2.SessionResponse()).HasField("logprobs")


def test_a_vector_comes_with_its_finish() -> None:
    session = Session(nothing, 1)
    session.keys[7] = RequestKey(1)
    session.started(7, Start(RequestKey(1), 4, 0))
    session.pooled(7, Pooled(RequestKey(1), b"abcd"))
    session.finished(7, Finish(RequestKey(1), FinishReason.STOP))
    session.flush()
    response = session.take(load)
    sent = outputs(response)
    assert sent.pooled == [outputs_pb2.Pooled(handle=7, values=b"abcd")]
    assert sent.finishes[0].reason == generation_pb2.FINISH_REASON_STOP
    assert response is not None
    assert list(response.finished_handles) == [7]
    session.flush()
    assert not (session.take(load) or worker_pb2.SessionResponse()).outputs


def test_a_finish_names_its_handle_outside_the_outputs() -> None:
    session = Session(nothing, 1)
    session.keys[7] = RequestKey(1)
    session.finished(7, Finish(RequestKey(1), FinishReason.ERROR, Overloaded("no room")))
    session.flush()
    response = session.take(load)
    assert response is not None
    assert list(response.finished_handles) == [7]
    [finish] = outputs(response).finishes
    assert finish.reason == generation_pb2.FINISH_REASON_ERROR
    assert finish.error.reason == "OVERLOADED"


def test_an_idle_client_hears_of_a_changed_load_once() -> None:
    woken: list[int] = []
    session = Session(lambda: woken.append(1), 9)
    session.flush()
    session.take(load)
    woken.clear()
    session.load_changed(LOAD, is_any_told=True)
    assert not woken
    session.load_changed(EngineLoad(9, 9, 9, 9, 9), is_any_told=True)
    assert woken


@pytest.mark.parametrize(
    ("before", "after", "is_told"),
    [
        (EngineLoad(0, 0, 0, 0, 1000), EngineLoad(0, 1, 0, 0, 1000), True),
        (EngineLoad(1, 0, 0, 0, 1000), EngineLoad(0, 0, 0, 0, 1000), True),
        (EngineLoad(100, 0, 0, 0, 1000), EngineLoad(100, 3, 0, 0, 1000), False),
        (EngineLoad(100, 0, 0, 0, 1000), EngineLoad(100, 7, 0, 0, 1000), True),
        (EngineLoad(1, 0, 900, 0, 1000), EngineLoad(1, 0, 800, 0, 1000), False),
        (EngineLoad(1, 0, 900, 0, 1000), EngineLoad(1, 0, 0, 0, 1000), True),
        (EngineLoad(1, 0, 0, 100, 1000), EngineLoad(1, 0, 0, 110, 1000), False),
        (EngineLoad(1, 0, 0, 100, 1000), EngineLoad(1, 0, 0, 150, 1000), True),
    ],
)
def test_an_idle_client_hears_soon_of_what_matters_and_later_of_the_rest(
    before: EngineLoad, after: EngineLoad, is_told: bool
) -> None:
    woken: list[int] = []
    session = Session(lambda: woken.append(1), 9)
    session.flush()
    session.take(lambda: before)
    woken.clear()
    session.load_changed(after, is_any_told=False)
    assert bool(woken) is is_told
    session.load_changed(after, is_any_told=True)
    assert woken


@pytest.mark.parametrize(("number", "consumed"), [(0, 0), (2, 0), (1, 1)])
def test_a_client_out_of_order_is_told_so(number: int, consumed: int) -> None:
    session = Session(nothing, 4)
    with pytest.raises(ProtocolViolation):
        session.command(number, consumed)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="window_responses"):
        Session(nothing, 0)


steps = st.lists(
    st.one_of(
        st.dictionaries(st.integers(1, 5), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        st.just("take"),
        st.just("credit"),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 3))
def test_whatever_is_merged_every_token_arrives_once_and_in_order(
    script: list[dict[int, list[int]] | str], window: int
) -> None:
    session = Session(nothing, window)
    produced: dict[int, list[int]] = {}
    received: dict[int, list[int]] = {}
    sent = consumed = commands = 0

    def take() -> bool:
        response = session.take(load)
        if response is None:
            return False
        message = outputs_pb2.StepOutputs.FromString(response.outputs)
        tokens = iter(message.token_ids)
        counts = message.token_counts or [1] * len(message.handles)
        for handle, count in zip(message.handles, counts, strict=True):
            received.setdefault(handle, []).extend(next(tokens) for _ in range(count))
        assert next(tokens, None) is None
        return True

    for step in script:
        if step == "take":
            sent += take()
            assert sent - consumed <= window
        elif step == "credit":
            commands += 1
            consumed = sent
            session.command(commands, consumed)
        else:
            assert isinstance(step, dict)
            for handle, tokens in step.items():
                if handle not in produced:
                    session.started(handle, Start(RequestKey(handle), 0, 0))
                produced.setdefault(handle, []).extend(tokens)
                if len(tokens) == 1:
                    session.produced_one(handle, tokens[0])
                else:
                    session.produced(handle, tokens)
            session.flush()
    session.command(commands + 1, sent)
    take()
    assert received == produced
