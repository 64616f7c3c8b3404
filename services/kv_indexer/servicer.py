"""KvIndexerService over an Indexer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from libs.common import tracing
from libs.common.duplex import serve_duplex
from libs.common.errors import NoLiveInstance, ProtocolViolation
from services.kv_indexer import metrics
from services.kv_indexer.indexer import Indexer
from services.kv_indexer.tiered_overlap import tiered_overlap
from services.kv_indexer.verification import Verifier
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc

SERVICE_NAME = kv_indexer_pb2.DESCRIPTOR.services_by_name["KvIndexerService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class KvIndexerServicer(kv_indexer_pb2_grpc.KvIndexerServiceServicer):
    """Thin handlers; errors become statuses in the server's interceptor."""

    def __init__(self, indexer: Indexer) -> None:
        self._indexer = indexer
        self._verifier = Verifier(indexer)
        self.closing = asyncio.Event()
        """Set to end all sessions; their routers then go elsewhere."""

    async def FindOverlap(
        self, request: kv_indexer_pb2.FindOverlapRequest, context: Context
    ) -> kv_indexer_pb2.FindOverlapResponse:
        """Looks all prompts up in one go, on the event loop: some microseconds each."""
        return self._find(request)

    # grpc.aio takes a coroutine that writes by itself as well as an iterator.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[kv_indexer_pb2.SessionRequest], context: Context
    ) -> None:
        """Answers each question as it comes, until the router ends the stream or we stop."""
        if self.closing.is_set():
            raise NoLiveInstance("the KV indexer is shutting down")
        answer: kv_indexer_pb2.SessionResponse | None = None
        news = asyncio.Event()

        def command(request: kv_indexer_pb2.SessionRequest) -> None:
            nonlocal answer
            if answer is not None:
                raise ProtocolViolation("a question came before the last one was answered")
            answer = kv_indexer_pb2.SessionResponse(find_overlap=self._find(request.find_overlap))
            news.set()

        def take() -> kv_indexer_pb2.SessionResponse | None:
            nonlocal answer
            taken, answer = answer, None
            return taken

        await serve_duplex(
            request_iterator, context, command=command, take=take, news=news, closing=self.closing
        )

    def _find(
        self, request: kv_indexer_pb2.FindOverlapRequest
    ) -> kv_indexer_pb2.FindOverlapResponse:
        response = kv_indexer_pb2.FindOverlapResponse()
        index = self._indexer.index
        degraded_reasons = self._indexer.degraded_reasons()
        for query in request.queries:
            span = tracing.follow(query.traceparent, "find overlap")
            model, block_size_tokens = query.model, query.block_size_tokens
            depths = index.overlap(model, block_size_tokens, query.sequence_hashes)
            if index.has_lower_tiers(model, block_size_tokens):
                response.overlaps.append(tiered_overlap(index, query, depths))
            else:
                response.overlaps.add(instance_ids=depths.keys(), blocks=depths.values())
            if span is not None:
                span.end(
                    {
                        "gen_ai.request.model": query.model,
                        "switchgear.sequence_hashes": len(query.sequence_hashes),
                        "switchgear.instances_with_overlap": len(depths),
                        "switchgear.queries": len(request.queries),
                        "switchgear.degraded_reasons": tuple(degraded_reasons),
                    }
                )
        for reason, instances in degraded_reasons.items():
            response.degraded_reasons.add(reason=reason, instance_ids=instances)
        metrics.queries.inc(len(request.queries))
        return response

    async def GetStatus(
        self, request: kv_indexer_pb2.GetStatusRequest, context: Context
    ) -> kv_indexer_pb2.GetStatusResponse:
        """Answers for people, tests and routers that want to know how far to trust the index."""
        return kv_indexer_pb2.GetStatusResponse(
            workers=[
                kv_indexer_pb2.WorkerStatus(
                    instance_id=status.worker.instance,
                    model=status.worker.model,
                    epoch=status.epoch,
                    sequence_number=status.applied,
                    blocks=status.held_blocks,
                    degraded_reason=status.degraded_reason,
                    missing_batches=status.missing_batches,
                    name=status.worker.name,
                    address=status.worker.address,
                )
                for status in self._indexer.statuses()
            ]
        )

    async def Verify(
        self, request: kv_indexer_pb2.VerifyRequest, context: Context
    ) -> kv_indexer_pb2.VerifyResponse:
        """Answers for people and tests."""
        return kv_indexer_pb2.VerifyResponse(
            comparisons=await self._verifier.verify(request.instance_ids)
        )
