"""PrefillWorkerService: one prompt at a time, for people and scripts."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from libs.common import grpc_errors
from libs.common.errors import InternalError
from libs.worker.host import EngineHost
from libs.worker.plain import run_alone, submit_of
from switchgear.prefill_worker.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc
from switchgear.worker.v1 import worker_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class PrefillWorkerServicer(prefill_worker_pb2_grpc.PrefillWorkerServiceServicer):
    """A thin shell on the same host that sessions use."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host

    async def Prefill(
        self, request: prefill_worker_pb2.PrefillRequest, context: Context
    ) -> prefill_worker_pb2.PrefillResponse:
        """Computes one prompt in a session of its own."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        submit = submit_of(request.generation, worker_pb2.LEG_PREFILL, context.time_remaining())
        async for response in run_alone(self._host, submit):
            for prefilled in response.prefilled:
                return prefill_worker_pb2.PrefillResponse(
                    kv_session=prefilled.kv_session,
                    cached_tokens=prefilled.cached_tokens,
                    duration=grpc_errors.duration_of(loop.time() - started),
                )
        raise InternalError("the session ended without a result")
