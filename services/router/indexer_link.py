"""The way to one KV indexer: a session for as long as both are there, or calls."""

from __future__ import annotations

import asyncio

import grpc

from libs.common.channels import Channels
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc


class IndexerLink:
    """Asks one question at a time. An indexer without sessions is asked by calls."""

    def __init__(self, address: str, channels: Channels) -> None:
        """Connects when it first asks."""
        self.certificate_version = channels.version
        """With which certificate it was opened."""
        self._channel = channels.open(address, "kv_indexer")
        self._stub: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
            kv_indexer_pb2_grpc.KvIndexerServiceStub(self._channel)
        )
        self._session: (
            grpc.aio.StreamStreamCall[kv_indexer_pb2.SessionRequest, kv_indexer_pb2.SessionResponse]
            | None
        ) = None
        self._has_sessions = True

    async def ask(
        self, question: kv_indexer_pb2.FindOverlapRequest
    ) -> kv_indexer_pb2.FindOverlapResponse:
        """Raises grpc.aio.AioRpcError. May be cancelled at any time."""
        if self._has_sessions:
            try:
                answer = await self._ask_in_session(question)
            except grpc.aio.AioRpcError as error:
                self._has_sessions = error.code() is not grpc.StatusCode.UNIMPLEMENTED
            else:
                if answer is not None:
                    return answer
        # Also the question that met the end of a session: asking it again does no harm.
        return await self._stub.FindOverlap(question)

    async def _ask_in_session(
        self, question: kv_indexer_pb2.FindOverlapRequest
    ) -> kv_indexer_pb2.FindOverlapResponse | None:
        """None when the session ended meanwhile. Raises grpc.aio.AioRpcError."""
        # One whose answer was not waited for is done as well: grpc cancels it with the reading.
        if self._session is None or self._session.done():
            self._session = self._stub.Session()
        try:
            await self._session.write(kv_indexer_pb2.SessionRequest(find_overlap=question))
            response = await self._session.read()
        except asyncio.InvalidStateError:
            return None
        if response is grpc.aio.EOF:
            return None
        assert isinstance(response, kv_indexer_pb2.SessionResponse)
        return response.find_overlap

    async def close(self) -> None:
        """Ends the session and the connection."""
        await self._channel.close()
