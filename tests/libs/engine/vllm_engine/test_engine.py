"""VllmEngine over a vLLM that computes nothing: what it is told and what it reports is scripted."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from libs.common.errors import InternalError, InvalidRequest
from libs.engine.interface import (
    EngineCacheCleared,
    EngineInfo,
    EngineKvEvent,
    EngineRequest,
    Finish,
    FinishReason,
    KvSession,
    Leg,
    LogprobOptions,
    Logprobs,
    Pooled,
    PoolingOptions,
    PoolingTask,
    RequestKey,
    Start,
    Step,
)
from libs.engine.vllm_engine import requests
from libs.engine.vllm_engine.engine import VllmEngine
from libs.engine.vllm_engine.port import OnOutputs, OverduePull, StepStats, Vllm
from libs.engine.vllm_engine.settings import VllmSettings

DEADLINE_SECONDS = 10.0
INFO = EngineInfo(
    block_size_tokens=32,
    total_kv_blocks=100,
    context_length_tokens=2048,
    max_running_requests=64,
    transfer_backend="nixl",
    publishes_kv_events=True,
)
VllmFinish = Enum("VllmFinish", ["STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"])


class FakeVllm(Vllm):
    """Writes down what it is told, in order, and says what a test has it say."""

    def __init__(self) -> None:
        self.info = INFO
        self.stats = StepStats()
        self.told: list[tuple[str, Any]] = []
        self.arguments: dict[str, Mapping[str, Any]] = {}
        self.priorities: dict[str, int] = {}
        self.overdue: list[OverduePull] = []
        self.rejects: set[str] = set()
        self.dies = asyncio.Event()
        self.closes = 0
        self._events: asyncio.Queue[list[EngineKvEvent]] = asyncio.Queue()
        self._heard = asyncio.Condition()

    def run(self, on_outputs: OnOutputs) -> asyncio.Task[None]:
        self.on_outputs = on_outputs
        self._life = asyncio.create_task(self._live())
        return self._life

    async def _live(self) -> None:
        await self.dies.wait()

    async def add(self, vllm_id: str, request: EngineRequest, arguments: Mapping[str, Any]) -> None:
        if vllm_id in self.rejects:
            raise InvalidRequest("no")
        self.arguments[vllm_id] = arguments
        self.priorities[vllm_id] = request.priority
        await self._hear("add" if request.pooling is None else "add pooling", vllm_id)

    async def abort(self, vllm_ids: Sequence[str]) -> None:
        await self._hear("abort", list(vllm_ids))

    async def release(self, vllm_request_id: str) -> None:
        await self._hear("release", vllm_request_id)

    async def overdue_pulls(self) -> list[OverduePull]:
        return self.overdue

    async def kv_events(self) -> AsyncIterator[list[EngineKvEvent]]:
        while True:
            yield await self._events.get()

    async def close(self) -> None:
        self.closes += 1
        self._life.cancel()

    def publish(self, events: list[EngineKvEvent]) -> None:
        self._events.put_nowait(events)

    async def _hear(self, what: str, about: Any) -> None:
        async with self._heard:
            self.told.append((what, about))
            self._heard.notify_all()

    async def hears(self, what: str, about: Any) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self._heard:
            await self._heard.wait_for(lambda: (what, about) in self.told)


class Recording:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[Step] = asyncio.Queue()
        self.events: asyncio.Queue[Sequence[EngineKvEvent]] = asyncio.Queue()
        self.failures: asyncio.Queue[BaseException] = asyncio.Queue()
        self.load_changes = 0

    def step(self, step: Step) -> None:
        self.steps.put_nowait(step)

    def kv_events(self, events: Sequence[EngineKvEvent]) -> None:
        self.events.put_nowait(events)

    def load_changed(self) -> None:
        self.load_changes += 1

    def failed(self, error: BaseException) -> None:
        self.failures.put_nowait(error)


class Bench:
    def __init__(self, engine: VllmEngine, vllm: FakeVllm, sink: Recording) -> None:
        self.engine, self.vllm, self.sink = engine, vllm, sink

    def step(self, *outputs: tuple[str, Any]) -> Step:
        self.vllm.on_outputs(outputs, 0.0)
        return self.sink.steps.get_nowait()

    async def submit(self, *new: EngineRequest) -> None:
        self.engine.submit(new)
        await self.vllm.hears("add", f"{new[-1].key}.0")


@asynccontextmanager
async def bench(leg: Leg, *, has_host_tier: bool = False) -> AsyncIterator[Bench]:
    vllm, sink = FakeVllm(), Recording()
    vllm.info = replace(INFO, has_host_tier=has_host_tier)

    async def load(settings: VllmSettings) -> Vllm:
        return vllm

    engine = VllmEngine(
        VllmSettings(model=Path("model"), leg=leg, transfer_timeout_seconds=0.0), load
    )
    assert await engine.start(sink) == vllm.info
    try:
        yield Bench(engine, vllm, sink)
    finally:
        await engine.close()


EMBED = PoolingOptions(PoolingTask.EMBED, dimensions=2)


async def test_what_a_prompt_is_pooled_into_comes_with_its_end() -> None:
    async with bench(Leg.WHOLE) as whole:
        whole.engine.submit([request_of(1, pooling=EMBED), request_of(2, pooling=EMBED)])
        await whole.vllm.hears("add pooling", "2.0")
        assert whole.vllm.arguments["1.0"] == {"task": "embed", "dimensions": 2}
        assert whole.engine.load().queued_prefill_tokens == 80
        done = output(finish=VllmFinish.STOP, cached=32)
        done.pooling_output = _Tensor([0.6, 0.8])
        failed = output(finish=VllmFinish.ERROR)
        failed.pooling_output = None
        step = whole.step(("1.0", done), ("2.0", failed))
        assert step.starts == [Start(RequestKey(1), 32, 0)]
        assert step.pooled == [Pooled(RequestKey(1), struct.pack("<2f", 0.6, 0.8))]
        assert step.keys == step.tokens == []
        assert step.finishes[0] == Finish(RequestKey(1), FinishReason.STOP)
        assert step.finishes[1].reason is FinishReason.ERROR
        load = whole.engine.load()
        assert (load.queued_prefill_tokens, load.waiting_requests) == (0, 0)


async def test_what_vllm_does_not_pool_is_refused() -> None:
    async with bench(Leg.WHOLE) as whole:
        whole.vllm.rejects.add("1.0")
        whole.engine.submit([request_of(1, pooling=EMBED)])
        async with asyncio.timeout(DEADLINE_SECONDS):
            step = await whole.sink.steps.get()
        assert isinstance(step.finishes[0].error, InvalidRequest)


class _Tensor:
    """As much of a tensor as is used."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def float(self) -> _Tensor:
        return self

    def numpy(self) -> Any:
        return np.array(self._values, dtype=np.float32)


@pytest.fixture
async def decode() -> AsyncIterator[Bench]:
    async with bench(Leg.DECODE) as made:
        yield made


@pytest.fixture
async def prefill() -> AsyncIterator[Bench]:
    async with bench(Leg.PREFILL) as made:
        yield made


def request_of(
    key: int,
    leg: Leg = Leg.WHOLE,
    tokens: int = 40,
    kv_session: KvSession | None = None,
    **others: Any,
) -> EngineRequest:
    return EngineRequest(
        key=RequestKey(key),
        request_id=f"r{key}",
        prompt=range(tokens),
        last_sequence_hash=7,
        leg=leg,
        max_tokens=16,
        kv_session=kv_session,
        **others,
    )


def session(peer: str = "peer", tokens: int = 40) -> KvSession:
    params = {
        "remote_request_id": "9.0-abcdef01",
        "remote_engine_id": peer,
        "remote_block_ids": [[1, 2]],
        "remote_host": "10.0.0.1",
        "remote_port": 5600,
    }
    return requests.session_of(request_of(9, tokens=tokens), params, 20.0)


def output(
    tokens: Sequence[int] = (),
    finish: VllmFinish | None = None,
    cached: int | None = None,
    pulled: int = 0,
    transfer_params: dict[str, Any] | None = None,
    logprobs: Any = None,
    prompt_logprobs: Any = None,
    events: Mapping[str, float] | None = None,
) -> Any:
    stats = None
    if cached is not None:
        stats = SimpleNamespace(num_local_cached_tokens=cached, num_external_cached_tokens=pulled)
    return SimpleNamespace(
        new_token_ids=list(tokens),
        finish_reason=finish,
        prefill_stats=stats,
        kv_transfer_params=transfer_params,
        new_logprobs=logprobs,
        new_prompt_logprobs_tensors=prompt_logprobs,
        events=[
            SimpleNamespace(type=SimpleNamespace(name=name), timestamp=seconds)
            for name, seconds in (events or {}).items()
        ]
        or None,
    )


def columns(token_ids: list[list[int]], logprobs: list[list[float]]) -> Any:
    """As vLLM's LogprobsLists and LogprobsTensors."""
    return SimpleNamespace(logprob_token_ids=np.array(token_ids), logprobs=np.array(logprobs))


KEPT = {
    "remote_request_id": "1.0-abcdef01",
    "remote_engine_id": "me",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
}


async def test_an_engine_step_is_one_step_with_the_tokens_of_all(decode: Bench) -> None:
    await decode.submit(request_of(1), request_of(2))
    step = decode.step(("1.0", output([5], cached=32)), ("2.0", output([6, 7], cached=0)))
    assert (step.keys, step.counts, step.tokens) == ([1, 2], [1, 2], [5, 6, 7])
    assert step.starts == [Start(RequestKey(1), 32, 0), Start(RequestKey(2), 0, 0)]


async def test_log_probabilities_are_as_many_as_were_asked_for(decode: Bench) -> None:
    await decode.submit(
        request_of(1, logprobs=LogprobOptions(output_alternatives=1, prompt_alternatives=0)),
        request_of(2),
    )
    # Rows are as long as the batch's longest.
    found = columns([[5, 5, 9], [6, 8, 6]], [[-0.5, -0.5, -1.0], [-2.0, -1.0, -2.0]])
    step = decode.step(
        (
            "1.0",
            output(
                [5, 6], cached=0, logprobs=found, prompt_logprobs=columns([[3, 4]], [[-4.0, -1.0]])
            ),
        ),
        ("2.0", output([7], cached=0)),
    )
    assert step.logprobs == [Logprobs(RequestKey(1), 2, [5, 5, 6, 8], [-0.5, -0.5, -2.0, -1.0])]
    assert step.prompt_logprobs == [Logprobs(RequestKey(1), 1, [3], [-4.0])]


async def test_a_prompt_whose_probabilities_are_asked_for_is_not_pulled(decode: Bench) -> None:
    asked = LogprobOptions(prompt_alternatives=0)
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session(), logprobs=asked))
    assert decode.vllm.arguments["1.0"]["extra_args"] is None
    assert decode.vllm.arguments["1.0"]["prompt_logprobs"] == 0


@pytest.mark.parametrize("leg", [Leg.PREFILL, Leg.DECODE])
async def test_a_priority_reaches_vllm(leg: Leg) -> None:
    async with bench(leg) as it:
        await it.submit(request_of(1, leg, priority=-3))
        assert it.vllm.priorities == {"1.0": -3}


async def test_a_sequence_starts_once(decode: Bench) -> None:
    await decode.submit(request_of(1))
    decode.step(("1.0", output([5], cached=0)))
    assert decode.step(("1.0", output([6]))).starts == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (VllmFinish.STOP, FinishReason.STOP),
        (VllmFinish.REPETITION, FinishReason.STOP),
        (VllmFinish.LENGTH, FinishReason.LENGTH),
        (VllmFinish.ABORT, FinishReason.CANCELLED),
    ],
)
async def test_a_finish_comes_with_the_last_token(
    decode: Bench, theirs: VllmFinish, ours: FinishReason
) -> None:
    await decode.submit(request_of(1))
    step = decode.step(("1.0", output([5], theirs, cached=0)))
    assert (step.tokens, step.finishes) == ([5], [Finish(RequestKey(1), ours)])


async def test_a_request_that_vllm_fails_ends_in_an_error(decode: Bench) -> None:
    await decode.submit(request_of(1))
    (finish,) = decode.step(("1.0", output(finish=VllmFinish.ERROR))).finishes
    assert (finish.reason, type(finish.error)) == (FinishReason.ERROR, InternalError)


async def test_a_request_that_vllm_does_not_accept_is_an_invalid_request(decode: Bench) -> None:
    decode.vllm.rejects.add("1.0")
    decode.engine.submit([request_of(1)])
    async with asyncio.timeout(DEADLINE_SECONDS):
        (finish,) = (await decode.sink.steps.get()).finishes
    assert (finish.key, type(finish.error)) == (1, InvalidRequest)
    assert decode.engine.load().waiting_requests == 0


async def test_a_request_cancelled_before_its_turn_never_reaches_vllm(decode: Bench) -> None:
    decode.engine.submit([request_of(1), request_of(2)])
    decode.engine.cancel([RequestKey(1)])
    await decode.vllm.hears("abort", ["1.0"])
    assert decode.vllm.told == [("add", "2.0"), ("abort", ["1.0"])]


async def test_a_cancelled_request_is_not_heard_of_again(decode: Bench) -> None:
    await decode.submit(request_of(1), request_of(2))
    decode.engine.cancel([RequestKey(1), RequestKey(5)])
    await decode.vllm.hears("abort", ["1.0"])
    step = decode.step(("1.0", output([5], cached=0)), ("2.0", output([6], cached=0)))
    assert step.keys == [2]


async def test_prompts_count_as_queued_until_they_are_computed(decode: Bench) -> None:
    await decode.submit(request_of(1, tokens=40), request_of(2, tokens=60))
    assert decode.engine.load().queued_prefill_tokens == 100
    decode.step(("1.0", output([5], cached=0)))
    assert decode.engine.load().queued_prefill_tokens == 60
    decode.engine.cancel([RequestKey(2)])
    assert decode.engine.load().queued_prefill_tokens == 0


async def test_load_is_the_last_steps_plus_what_was_submitted_since(decode: Bench) -> None:
    decode.vllm.stats.running_requests = 1
    decode.vllm.stats.kv_cache_usage = 0.25
    await decode.submit(request_of(1), request_of(2), request_of(3))
    load = decode.engine.load()
    assert (load.running_requests, load.waiting_requests) == (1, 2)
    assert (load.active_kv_blocks, load.total_kv_blocks) == (25, 100)


async def test_what_vllm_counts_after_a_step_is_told_as_a_changed_load(decode: Bench) -> None:
    decode.vllm.stats.on_change()
    assert decode.sink.load_changes == 1


async def test_a_prefill_leg_ends_in_a_session_that_outlasts_no_lease(prefill: Bench) -> None:
    await prefill.submit(request_of(1, Leg.PREFILL))
    told = prefill.vllm.arguments["1.0"]
    assert told["max_tokens"] == 1
    assert told["extra_args"]["kv_transfer_params"]["do_remote_decode"]
    step = prefill.step(
        ("1.0", output([5], VllmFinish.LENGTH, cached=32, transfer_params=dict(KEPT)))
    )
    (prefilled,) = step.prefilled
    assert (step.tokens, step.finishes) == ([], [])
    assert (prefilled.key, prefilled.cached_tokens) == (1, 32)
    assert prefilled.kv_session.time_to_live_seconds < 30.0 - 1.0


async def test_a_prefill_leg_whose_kv_is_not_kept_ends_in_an_error(prefill: Bench) -> None:
    await prefill.submit(request_of(1, Leg.PREFILL))
    (finish,) = prefill.step(("1.0", output([5], VllmFinish.LENGTH, cached=0))).finishes
    assert (finish.reason, type(finish.error)) == (FinishReason.ERROR, InternalError)


async def test_cancelling_a_prefilled_request_frees_its_kv(prefill: Bench) -> None:
    await prefill.submit(request_of(1, Leg.PREFILL))
    prefill.step(("1.0", output([5], VllmFinish.LENGTH, cached=0, transfer_params=dict(KEPT))))
    prefill.engine.cancel([RequestKey(1)])
    await prefill.vllm.hears("release", "1.0-abcdef01")


async def test_a_decode_leg_pulls_and_reports_what_it_pulled(decode: Bench) -> None:
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session()))
    pull = decode.vllm.arguments["1.0"]["extra_args"]["kv_transfer_params"]
    assert pull["remote_engine_id"] == "peer"
    assert decode.engine.load().queued_prefill_tokens == 0
    step = decode.step(("1.0", output([5], cached=0, pulled=40)))
    assert step.starts == [Start(RequestKey(1), 0, 40)]
    counters = decode.engine.counters()
    assert (counters.transferred_blocks, counters.transfer_failures) == (2, 0)


@pytest.mark.parametrize(
    ("leg", "local", "external", "cached", "pulled"),
    [
        (Leg.WHOLE, 0, 32, 32, 0),
        (Leg.DECODE, 0, 40, 0, 40),
        (Leg.DECODE, 32, 8, 32, 8),
        # The pull came too late, and the host tier had a block.
        (Leg.DECODE, 0, 32, 32, 0),
    ],
)
async def test_what_vllm_calls_external_is_a_pull_or_from_host_memory(
    leg: Leg, local: int, external: int, cached: int, pulled: int
) -> None:
    async with bench(Leg.DECODE, has_host_tier=True) as it:
        await it.submit(request_of(1, leg, kv_session=session() if leg is Leg.DECODE else None))
        step = it.step(("1.0", output([5], cached=local, pulled=external)))
        assert step.starts == [Start(RequestKey(1), cached, pulled)]
        counters = it.engine.counters()
        assert counters.loaded_host_blocks == (0 if pulled else 1)
        assert counters.transfer_failures == (leg is Leg.DECODE and not pulled)


async def test_the_wait_before_a_request_runs_is_its_queue_or_its_pull(decode: Bench) -> None:
    await decode.submit(request_of(1), request_of(2, Leg.DECODE, kv_session=session()))
    waited = {"QUEUED": 10.0, "SCHEDULED": 10.5}
    step = decode.step(
        ("1.0", output([5], cached=0, events=waited)),
        ("2.0", output([5], cached=0, pulled=40, events=waited)),
    )
    waits = [(start.queue_seconds, start.transfer_seconds) for start in step.starts]
    assert waits == [(0.5, 0.0), (0.0, 0.5)]


async def test_a_session_of_another_prompt_is_not_pulled(decode: Bench) -> None:
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session(tokens=41)))
    assert decode.vllm.arguments["1.0"]["extra_args"] is None
    assert decode.engine.load().queued_prefill_tokens == 40


async def test_a_prompt_computed_here_after_all_counts_as_a_failed_transfer(decode: Bench) -> None:
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session()))
    decode.step(("1.0", output([5], cached=32, pulled=0)))
    assert decode.engine.counters().transfer_failures == 1


async def test_an_overdue_pull_is_aborted_and_its_prompt_computed_here(
    decode: Bench,
) -> None:
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session()))
    decode.vllm.overdue = [OverduePull("1.0-abcdef01", "1.0")]
    await decode.vllm.hears("add", "1.1")
    assert decode.vllm.told[1:] == [("abort", ["1.0"]), ("add", "1.1")]
    assert decode.vllm.arguments["1.1"]["extra_args"] is None
    assert decode.step(("1.1", output([5], cached=0))).tokens == [5]


async def test_a_stalled_peer_is_left_alone_until_its_pulls_have_ended(decode: Bench) -> None:
    await decode.submit(request_of(1, Leg.DECODE, kv_session=session()))
    decode.vllm.overdue = [OverduePull("1.0-abcdef01", "1.0")]
    await decode.vllm.hears("add", "1.1")
    await decode.submit(
        request_of(2, Leg.DECODE, kv_session=session()),
        request_of(3, Leg.DECODE, kv_session=session(peer="other")),
    )
    assert decode.vllm.arguments["2.0"]["extra_args"] is None
    assert decode.vllm.arguments["3.0"]["extra_args"] is not None


async def test_kv_events_reach_the_sink(decode: Bench) -> None:
    decode.vllm.publish([EngineCacheCleared()])
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await decode.sink.events.get() == [EngineCacheCleared()]


async def test_a_dead_engine_core_is_reported_once(decode: Bench) -> None:
    decode.vllm.dies.set()
    async with asyncio.timeout(DEADLINE_SECONDS):
        error = await decode.sink.failures.get()
    await decode.engine.close()
    assert isinstance(error, ExceptionGroup)
    assert "engine core died" in str(error.exceptions[0])
    assert decode.sink.failures.empty()


async def test_closing_is_no_failure_and_can_be_done_twice(decode: Bench) -> None:
    await decode.engine.close()
    await decode.engine.close()
    assert decode.vllm.closes == 1
    assert decode.sink.failures.empty()
