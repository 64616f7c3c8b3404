"""One request in a session of its own: what the plain calls of both workers are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from libs.common import grpc_errors
from libs.worker.host import EngineHost
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.worker.v1 import worker_pb2

_HANDLE = 1


def submit_of(
    generation: generation_pb2.Generation,
    leg: worker_pb2.Leg.ValueType,
    timeout_seconds: float | None,
) -> worker_pb2.Submit:
    """The command that a plain call stands for."""
    submit = worker_pb2.Submit(handle=_HANDLE, generation=generation.SerializeToString(), leg=leg)
    if timeout_seconds is not None:
        submit.timeout.CopyFrom(grpc_errors.duration_of(timeout_seconds))
    return submit


async def run_alone(
    host: EngineHost, submit: worker_pb2.Submit
) -> AsyncIterator[worker_pb2.SessionResponse]:
    """Runs one request and yields what its session has to say, to the end.

    Raises the error of a refusal or of the engine. Cancels the request when the caller stops
    reading.
    """
    news = asyncio.Event()
    session = host.open(news.set, window_responses=1)
    consumed = 0
    try:
        session.command(1, consumed)
        host.submit(session, [submit])
        while True:
            await news.wait()
            news.clear()
            if (response := session.take(host.engine.load)) is None:
                continue
            for refusal in response.refusals:
                raise grpc_errors.from_message(refusal.error)
            for finish in outputs_of(response).finishes:
                if finish.reason == generation_pb2.FINISH_REASON_ERROR:
                    raise grpc_errors.from_message(finish.error)
            yield response
            # Not `session.keys`: the end may have come while the caller was busy with this.
            if response.finished_handles or response.prefilled:
                return
            consumed += 1
            session.command(session.taken_sequence_number + 1, consumed)
    finally:
        host.close(session)


def outputs_of(response: worker_pb2.SessionResponse) -> outputs_pb2.StepOutputs:
    """The outputs in a session's message, decoded."""
    return outputs_pb2.StepOutputs.FromString(response.outputs)
