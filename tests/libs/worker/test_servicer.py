"""A worker's session over real gRPC."""

from __future__ import annotations

import grpc

from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.workers import MODEL, sim_worker


async def test_a_request_that_is_cancelled_in_the_message_that_brings_it_does_not_run() -> None:
    endless = generation_pb2.Generation(
        request_id="r",
        model=MODEL,
        token_ids=[1, 2, 3],
        stopping=generation_pb2.StoppingOptions(max_tokens=100_000, ignore_eos=True),
    )
    submit = worker_pb2.Submit(
        handle=1, generation=endless.SerializeToString(), leg=worker_pb2.LEG_WHOLE
    )
    async with (
        sim_worker(discovery_pb2.ROLE_DECODE_WORKER, "d") as worker,
        grpc.aio.insecure_channel(worker.instance.address) as channel,
    ):
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Session()
        await call.write(
            worker_pb2.SessionRequest(
                sequence_number=1, window_responses=4, submits=[submit], cancels=[1]
            )
        )
        await until(lambda: any(s.taken_sequence_number == 1 for s in worker.host.sessions))
        await until(worker.host.idle.is_set)
        call.cancel()
