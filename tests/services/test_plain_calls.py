"""The plain calls of both workers over real gRPC."""

from __future__ import annotations

import grpc
import pytest

from libs.common import grpc_errors
from libs.common.errors import InvalidRequest, ModelNotFound, TaskNotSupported
from libs.engine.sim.core.embedding import embedding
from libs.engine.sim.settings import SimSettings
from switchgear.common.v1 import generation_pb2
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.discovery.v1 import discovery_pb2
from switchgear.prefill_worker.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.workers import MODEL, SimWorker, sim_worker

PREFILL = discovery_pb2.ROLE_PREFILL_WORKER
DECODE = discovery_pb2.ROLE_DECODE_WORKER


def generation(max_tokens: int = 5, model: str = MODEL) -> generation_pb2.Generation:
    return generation_pb2.Generation(
        request_id="r",
        model=model,
        token_ids=range(1, 100),
        stopping=generation_pb2.StoppingOptions(max_tokens=max_tokens),
    )


async def generate(
    worker: SimWorker, request: decode_worker_pb2.GenerateRequest
) -> list[decode_worker_pb2.GenerateResponse]:
    async with grpc.aio.insecure_channel(worker.instance.address) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)
        )
        with grpc_errors.typed():
            return [response async for response in stub.Generate(request, timeout=10)]


async def prefill(worker: SimWorker) -> prefill_worker_pb2.PrefillResponse:
    async with grpc.aio.insecure_channel(worker.instance.address) as channel:
        stub: prefill_worker_pb2_grpc.PrefillWorkerServiceAsyncStub = (
            prefill_worker_pb2_grpc.PrefillWorkerServiceStub(channel)
        )
        request = prefill_worker_pb2.PrefillRequest(generation=generation())
        response = await stub.Prefill(request, timeout=10)
        assert isinstance(response, prefill_worker_pb2.PrefillResponse)
        return response


def tokens(responses: list[decode_worker_pb2.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


async def test_a_prompt_computed_by_one_worker_is_continued_by_another() -> None:
    async with sim_worker(PREFILL, "p") as p, sim_worker(DECODE, "d") as d:
        whole = await generate(d, decode_worker_pb2.GenerateRequest(generation=generation()))
        async with sim_worker(DECODE, "d2") as d2:
            computed = await prefill(p)
            pulled = await generate(
                d2,
                decode_worker_pb2.GenerateRequest(
                    generation=generation(), kv_session=computed.kv_session
                ),
            )
    assert tokens(pulled) == tokens(whole)
    assert len(tokens(whole)) == 5
    assert (whole[0].cached_tokens, whole[0].transferred_tokens) == (0, 0)
    assert pulled[0].transferred_tokens >= 96
    assert [bool(r.finish_reason) for r in whole] == [False] * (len(whole) - 1) + [True]


async def test_log_probabilities_come_with_their_tokens() -> None:
    asked = generation()
    asked.logprobs.output_alternatives = 2
    asked.logprobs.prompt_alternatives = 0
    async with sim_worker(DECODE, "d") as d:
        answer = await generate(d, decode_worker_pb2.GenerateRequest(generation=asked))
    for response in answer:
        # The first candidate of three is the token itself.
        assert list(response.logprobs.token_ids[::3]) == list(response.token_ids)
    assert list(answer[0].prompt_logprobs.token_ids) == list(asked.token_ids[1:])


async def test_kv_of_another_prompt_is_not_pulled() -> None:
    async with sim_worker(PREFILL, "p") as p, sim_worker(DECODE, "d") as d:
        computed = await prefill(p)
        other = generation()
        other.token_ids[0] = 4321
        got = await generate(
            d,
            decode_worker_pb2.GenerateRequest(generation=other, kv_session=computed.kv_session),
        )
    assert got[0].transferred_tokens == 0
    assert len(tokens(got)) == 5


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (generation(model="nobody"), ModelNotFound),
        (generation(max_tokens=0), InvalidRequest),
    ],
)
async def test_bad_requests_get_typed_errors(
    request_: generation_pb2.Generation, error: type[Exception]
) -> None:
    async with sim_worker(DECODE, "d") as d:
        with pytest.raises(error):
            await generate(d, decode_worker_pb2.GenerateRequest(generation=request_))


async def test_a_cancelled_call_is_cancelled_in_the_engine() -> None:
    slow = SimSettings(timing="fixed", step_ms=20)
    async with (
        sim_worker(DECODE, "d", slow) as d,
        grpc.aio.insecure_channel(d.instance.address) as channel,
    ):
        stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)
        )
        request = decode_worker_pb2.GenerateRequest(generation=generation(100_000))
        call = stub.Generate(request)
        await call.read()
        assert d.host.request_ids() == ["r"]
        call.cancel()
        await d.host.idle.wait()


async def test_status_tells_what_runs() -> None:
    slow = SimSettings(timing="fixed", step_ms=20)
    async with (
        sim_worker(DECODE, "d", slow) as d,
        grpc.aio.insecure_channel(d.instance.address) as channel,
    ):
        stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)
        )
        call = stub.Generate(decode_worker_pb2.GenerateRequest(generation=generation(100_000)))
        await call.read()
        workers: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        status = await workers.GetStatus(worker_pb2.GetStatusRequest())
        assert list(status.request_ids) == ["r"]
        assert status.load.running_requests == 1
        call.cancel()


async def test_a_vector_comes_with_the_end() -> None:
    embed = generation_pb2.PoolingOptions(task=generation_pb2.POOLING_TASK_EMBED)
    asked = generation_pb2.Generation(
        request_id="r", model=MODEL, token_ids=range(1, 100), pooling=embed
    )
    request = decode_worker_pb2.GenerateRequest(generation=asked)
    async with sim_worker(DECODE, "e", SimSettings(embedding_dimensions=48)) as e:
        [answer] = await generate(e, request)
        assert answer.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert answer.pooled.values == embedding(range(1, 100), 48)
        assert not answer.token_ids
        with pytest.raises(TaskNotSupported):
            await generate(e, decode_worker_pb2.GenerateRequest(generation=generation()))
    async with sim_worker(DECODE, "d") as d:
        with pytest.raises(TaskNotSupported):
            await generate(d, request)
