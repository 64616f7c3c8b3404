"""One session stream to one worker: commands up, one message per engine step down."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import grpc

from libs.common.grpc_errors import duration_of
from libs.common.tasks import background
from services.router.core.workers import Booking, Load, Worker
from switchgear.common.v1 import generation_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

Handle = int


class WorkerLink:
    """Commands that have not been written yet, and bookings that the worker has not taken over.

    Everything that is ready when the stream can be written goes into one message.
    """

    def __init__(
        self,
        worker: Worker,
        stub: worker_pb2_grpc.WorkerServiceAsyncStub,
        window_responses: int,
        on_response: Callable[[WorkerLink, worker_pb2.SessionResponse], None],
    ) -> None:
        self.worker = worker
        self._stub = stub
        self._window = window_responses
        self._on_response = on_response
        self._pending = worker_pb2.SessionRequest(
            sequence_number=1, window_responses=window_responses
        )
        self._news = asyncio.Event()
        self._news.set()
        self._consumed = 0
        self._acknowledged = 0
        self._bookings: deque[tuple[int, Booking]] = deque()
        self.was_answered = False
        """Whether the worker has taken the session up. If it never did, it has run nothing."""

    def submit(
        self,
        handle: Handle,
        generation: bytes,
        leg: worker_pb2.Leg.ValueType,
        booking: Booking,
        *,
        timeout_seconds: float | None,
        kv_session: generation_pb2.KvSessionRef | None = None,
        traceparent: str = "",
    ) -> None:
        """Sends a request. Its booking, already on the worker, stays until the worker's load has
        it."""
        submit = self._pending.submits.add(
            handle=handle, generation=generation, leg=leg, traceparent=traceparent
        )
        if timeout_seconds is not None:
            submit.timeout.CopyFrom(duration_of(timeout_seconds))
        if kv_session is not None:
            submit.kv_session.CopyFrom(kv_session)
        self._bookings.append((self._pending.sequence_number, booking))
        self._news.set()

    def cancel(self, handle: Handle) -> None:
        """Drops a request. It may still be heard of, in what was on its way."""
        self._pending.cancels.append(handle)
        self._news.set()

    def consumed(self, responses: int) -> None:
        """Gives the worker credit for responses that have left this process."""
        self._consumed += responses
        if self._consumed - self._acknowledged >= (self._window + 1) // 2:
            self._news.set()

    async def run(self) -> None:
        """Runs the stream until it ends; never returns while the worker is well.

        Raises grpc.aio.AioRpcError when the stream breaks. Bookings are given back in any case.
        """
        call = self._stub.Session()
        try:
            async with background(self._write(call)):
                while True:
                    response = await call.read()
                    if response is grpc.aio.EOF:
                        return
                    assert isinstance(response, worker_pb2.SessionResponse)
                    self._take(response)
        finally:
            call.cancel()
            while self._bookings:
                self.worker.unbook(self._bookings.popleft()[1])

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                message = self._pending
                message.consumed_responses = self._acknowledged = self._consumed
                self._pending = worker_pb2.SessionRequest(
                    sequence_number=message.sequence_number + 1
                )
                await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The reader sees the same end, and says so.

    def _take(self, response: worker_pb2.SessionResponse) -> None:
        self.was_answered = True
        load = response.load
        self.worker.load = Load(
            load.running_requests,
            load.waiting_requests,
            load.queued_prefill_tokens,
            load.active_kv_blocks,
            load.total_kv_blocks,
        )
        taken = response.taken_sequence_number
        while self._bookings and self._bookings[0][0] <= taken:
            self.worker.unbook(self._bookings.popleft()[1])
        self._on_response(self, response)
