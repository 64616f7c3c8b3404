"""DecodeWorkerService: one request at a time, for people and scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from libs.worker.host import EngineHost
from libs.worker.plain import outputs_of, run_alone, submit_of
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.worker.v1 import worker_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeWorkerServicer(decode_worker_pb2_grpc.DecodeWorkerServiceServicer):
    """A thin shell on the same host that sessions use."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host

    async def Generate(
        self, request: decode_worker_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[decode_worker_pb2.GenerateResponse]:
        """Runs one request in a session of its own."""
        is_pull = request.HasField("kv_session")
        submit = submit_of(
            request.generation,
            worker_pb2.LEG_DECODE if is_pull else worker_pb2.LEG_WHOLE,
            context.time_remaining(),
        )
        if is_pull:
            submit.kv_session.CopyFrom(request.kv_session)
        async for message in run_alone(self._host, submit):
            outputs = outputs_of(message)
            response = decode_worker_pb2.GenerateResponse(token_ids=outputs.token_ids)
            for start in outputs.starts:
                response.cached_tokens = start.cached_tokens
                response.transferred_tokens = start.transferred_tokens
            if outputs.HasField("logprobs"):
                response.logprobs.CopyFrom(outputs.logprobs)
            if outputs.HasField("prompt_logprobs"):
                response.prompt_logprobs.CopyFrom(outputs.prompt_logprobs)
            for pooled in outputs.pooled:
                response.pooled.CopyFrom(pooled)
            for finish in outputs.finishes:
                response.finish_reason = finish.reason
            if response.token_ids or response.finish_reason:
                yield response
