"""WorkerService over an EngineHost: sessions, model files, KV snapshots and batches, status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import grpc

from libs.common.duplex import first_message, serve_duplex
from libs.common.errors import ModelNotFound, NoLiveInstance
from libs.common.kv_events import Tier
from libs.worker.core import wire
from libs.worker.host import EngineHost
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

FILE_PIECE_BYTES = 1 << 20
MAX_STATUS_REQUEST_IDS = 1000

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Thin handlers; the host and the ledger do the work."""

    def __init__(
        self,
        host: EngineHost,
        files: Mapping[str, bytes],
        snapshot: Callable[[], Iterator[worker_pb2.GetKvSnapshotResponse]],
        batches: Callable[[int, int, int], Iterator[worker_pb2.GetKvBatchesResponse]],
        cached_blocks: Callable[[], Mapping[Tier, int]],
    ) -> None:
        self._host = host
        self._files = files
        self._snapshot = snapshot
        self._batches = batches
        self._cached_blocks = cached_blocks
        self.closing = asyncio.Event()
        """Set to end all sessions; their clients then go elsewhere."""

    # grpc.aio takes a coroutine that writes by itself as well as an iterator.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: Context
    ) -> None:
        """Gives commands to the host and sends what the session has ready."""
        if self._host.is_draining:
            raise NoLiveInstance("the worker is draining")
        first = await first_message(request_iterator)
        if first is None:
            return
        news = asyncio.Event()
        session = self._host.open(news.set, first.window_responses)

        def command(request: worker_pb2.SessionRequest) -> None:
            session.command(request.sequence_number, request.consumed_responses)
            if request.submits:
                self._host.submit(session, request.submits)
            # After them: a request may be cancelled in the message that brings it.
            if request.cancels:
                self._host.cancel(session, request.cancels)

        try:
            command(first)
            await serve_duplex(
                request_iterator,
                context,
                command=command,
                take=lambda: session.take(self._host.engine.load),
                news=news,
                closing=self.closing,
            )
        finally:
            self._host.close(session)

    async def GetModelFiles(
        self, request: worker_pb2.GetModelFilesRequest, context: Context
    ) -> AsyncIterator[worker_pb2.GetModelFilesResponse]:
        """Sends each file in pieces; an empty file as one empty piece."""
        if request.model != self._host.limits.model:
            raise ModelNotFound(f"model {request.model!r} is not served here", param="model")
        for name, data in self._files.items():
            for start in range(0, max(len(data), 1), FILE_PIECE_BYTES):
                yield worker_pb2.GetModelFilesResponse(
                    name=name, data=data[start : start + FILE_PIECE_BYTES]
                )

    async def GetKvSnapshot(
        self, request: worker_pb2.GetKvSnapshotRequest, context: Context
    ) -> AsyncIterator[worker_pb2.GetKvSnapshotResponse]:
        """Copies the moment's state at once, then sends it piece by piece."""
        for piece in self._snapshot():
            yield piece

    async def GetKvBatches(
        self, request: worker_pb2.GetKvBatchesRequest, context: Context
    ) -> AsyncIterator[worker_pb2.GetKvBatchesResponse]:
        """Finds all of them at once, or refuses, then sends them piece by piece."""
        for piece in self._batches(
            request.epoch, request.first_sequence_number, request.last_sequence_number
        ):
            yield piece

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Context
    ) -> worker_pb2.GetStatusResponse:
        """Answers for people and tests."""
        cached = self._cached_blocks()
        return worker_pb2.GetStatusResponse(
            load=wire.load_to_message(self._host.engine.load()),
            sessions=len(self._host.sessions),
            request_ids=self._host.request_ids()[:MAX_STATUS_REQUEST_IDS],
            cached_kv_blocks=cached[Tier.DEVICE],
            cached_host_kv_blocks=cached.get(Tier.HOST, 0),
        )
