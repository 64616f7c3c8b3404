"""Sessions with routers: many requests on one stream, one wake-up a message.

A request that is submitted gets an `Inbox`. A session's reader puts what a message holds into the
inboxes and wakes each of them once; a request that reads more slowly finds more at a time. The
writer puts everything that is waiting to be sent into one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError

from libs.common import grpc_errors, logs
from libs.common.channels import Channels
from libs.common.discovery import Table
from libs.common.errors import NoLiveInstance, ProtocolViolation, SwitchgearError, WorkerLost
from libs.common.tasks import background
from services.frontend.core.logprobs import Position, positions_of
from services.frontend.rounds import Rounds
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2
from switchgear.router.v1.router_pb2_grpc import RouterServiceStub

log = logs.get(__name__)

CONNECT_SECONDS = 5.0
RECONNECT_SECONDS = 0.2

HOP_MARGIN_SECONDS = 0.25
"""What the next hop gets less, so that its error arrives before our own deadline; at most a tenth
of the time."""

BATCH_BYTES = 8 << 20
"""Submits beyond this wait for the next message; one message has a size limit."""

_Call: TypeAlias = (
    "grpc.aio.StreamStreamCall[router_pb2.SessionRequest, router_pb2.SessionResponse]"
)


class Inbox:
    """What has come for one submitted request, and was not read yet."""

    __slots__ = (
        "_has_news",
        "_logprobs",
        "_reader",
        "_session",
        "_tokens",
        "error",
        "failed_instance_id",
        "finish_reason",
        "handle",
        "pooled",
        "prompt_logprobs",
        "routed",
        "start",
    )

    def __init__(self, session: _RouterSession, handle: int) -> None:
        self.handle = handle
        self.routed: router_pb2.Routed | None = None
        self.start: outputs_pb2.SequenceStart | None = None
        """Comes with the first tokens at the latest."""
        self.finish_reason: generation_pb2.FinishReason.ValueType | None = None
        """Set when the engine ended the request well. The last tokens came with it."""
        self.error: SwitchgearError | None = None
        """Set when the request failed. Tokens that came before are good."""
        self.failed_instance_id = 0
        """With an error: the worker to exclude next time; 0 when it was nobody's fault."""
        self.prompt_logprobs: list[Position] = []
        """Come with the first tokens."""
        self.pooled = b""
        """What a prompt was pooled into: 32-bit floats, little-endian. Comes with the finish."""
        self._logprobs: list[Position] = []
        self._session = session
        self._tokens: list[int] = []
        self._has_news = False
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Nothing follows what is in the inbox."""
        return self.finish_reason is not None or self.error is not None

    async def take(self) -> list[int]:
        """Waits for something to arrive; the tokens since last time. Read `is_over` after it."""
        if not self._has_news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._has_news = False
        tokens, self._tokens = self._tokens, []
        return tokens

    def take_logprobs(self) -> list[Position]:
        """To be read right after `take`: of those tokens, if the request asked for them."""
        logprobs, self._logprobs = self._logprobs, []
        return logprobs

    def close(self) -> None:
        """Ends the interest in the request; cancels it if it is not over. May be called twice."""
        self._session.forget(self)

    def put(self, token: int) -> None:
        self._tokens.append(token)
        self._wake()

    def put_logprobs(self, positions: list[Position]) -> None:
        """Of the tokens that are put in the same message."""
        self._logprobs += positions

    def put_many(self, tokens: list[int]) -> None:
        self._tokens += tokens
        self._wake()

    def _wake(self) -> None:
        self._has_news = True
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    def finish(self, finish: outputs_pb2.SequenceFinish) -> None:
        if finish.reason in (
            generation_pb2.FINISH_REASON_STOP,
            generation_pb2.FINISH_REASON_LENGTH,
        ):
            self.finish_reason = finish.reason
            self._wake()
            return
        worker_id = self.routed.decode_worker.instance_id if self.routed else 0
        if finish.reason == generation_pb2.FINISH_REASON_ERROR:
            self.fail(grpc_errors.from_message(finish.error), worker_id)
        else:
            # We did not cancel it, so whoever did was giving up the worker.
            self.fail(WorkerLost("the worker cancelled the request"), worker_id)

    def fail(self, error: SwitchgearError, failed_instance_id: int = 0) -> None:
        self.error = error
        self.failed_instance_id = failed_instance_id
        self._wake()


class RouterSessions:
    """One session with each live router."""

    def __init__(self, window_responses: int, channels: Channels | None = None) -> None:
        self._window_responses = window_responses
        self._channels = channels or Channels()
        self._sessions: dict[int, _RouterSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connected = asyncio.Event()

    @asynccontextmanager
    async def following(self, instances: Table[discovery_pb2.Instance]) -> AsyncIterator[None]:
        """Keeps a session with every router in the table while the body runs."""

        def reconcile() -> None:
            self._reconcile(
                {
                    instance.instance_id: instance
                    for instance in instances.values()
                    if instance.role == discovery_pb2.ROLE_ROUTER
                }
            )

        instances.on_change(reconcile)
        reconcile()
        try:
            yield
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _reconcile(self, routers: dict[int, discovery_pb2.Instance]) -> None:
        for instance_id, session in self._sessions.items():
            session.set_listed(instance_id in routers)
        for instance_id, router in routers.items():
            if instance_id not in self._sessions:
                self._start(router)

    def _start(self, router: discovery_pb2.Instance) -> None:
        session = _RouterSession(
            router, self._window_responses, self._on_connection, self._channels
        )
        self._sessions[router.instance_id] = session
        task = asyncio.create_task(session.run(), name=f"session with {router.name}")
        self._tasks.add(task)

        def on_end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            del self._sessions[router.instance_id]
            self._on_connection()
            if task.cancelled():
                return
            if (error := task.exception()) is not None:
                log.error("router session failed", router=router.name, exc_info=error)
            if session.is_listed:
                # It came back just as its session ended.
                self._start(router)

        task.add_done_callback(on_end)

    def _on_connection(self) -> None:
        if any(session.takes_requests for session in self._sessions.values()):
            self._connected.set()
        else:
            self._connected.clear()

    @property
    def is_connected(self) -> bool:
        """Whether a request could be submitted now."""
        return self._connected.is_set()

    @property
    def in_flight(self) -> int:
        """Requests that routers have of ours."""
        return sum(session.in_flight for session in self._sessions.values())

    async def wait_connected(self, seconds: float) -> None:
        """Raises NoLiveInstance when no router is connected for that long."""
        try:
            async with asyncio.timeout(seconds):
                await self._connected.wait()
        except TimeoutError:
            raise NoLiveInstance("no router can be reached") from None

    async def submit_in_time(
        self,
        routing: router_pb2.RoutingRequest,
        generation: bytes,
        *,
        deadline: float,
        patience_seconds: float,
    ) -> Inbox:
        """As `submit`, with the time left until the deadline, in the event loop's time, and waiting
        that long for a router. Raises NoLiveInstance."""
        if not self.is_connected:
            await self.wait_connected(patience_seconds)
        left_seconds = deadline - asyncio.get_running_loop().time()
        margin_seconds = min(HOP_MARGIN_SECONDS, left_seconds / 10)
        routing.timeout.CopyFrom(grpc_errors.duration_of(left_seconds - margin_seconds))
        return self.submit(routing, generation)

    def submit(self, routing: router_pb2.RoutingRequest, generation: bytes) -> Inbox:
        """Gives the request to the router that has the fewest of ours.

        Raises NoLiveInstance when none is connected.
        """
        sessions = [session for session in self._sessions.values() if session.takes_requests]
        if not sessions:
            raise NoLiveInstance("no router can be reached")
        return min(sessions, key=lambda session: session.in_flight).submit(routing, generation)


class _RouterSession:
    """The stream to one router. Connects again and again while the router is listed."""

    def __init__(
        self,
        router: discovery_pb2.Instance,
        window_responses: int,
        on_connection: Callable[[], None],
        channels: Channels,
    ) -> None:
        self._router = router
        self._facts = {"router": router.name, "address": router.address}
        self._channels = channels
        self._window_responses = window_responses
        self._on_connection = on_connection
        self.is_listed = True
        self._is_connected = False
        self._handle = 0
        self._inboxes: dict[int, Inbox] = {}
        self._submits: list[router_pb2.Submit] = []
        self._cancels: list[int] = []
        self._consumed_responses = 0
        self._to_send = asyncio.Event()
        self._call: _Call | None = None

    @property
    def in_flight(self) -> int:
        """Requests that the router has of ours."""
        return len(self._inboxes)

    @property
    def takes_requests(self) -> bool:
        """A router that left discovery drains: it goes on with what it has."""
        return self._is_connected and self.is_listed

    def set_listed(self, is_listed: bool) -> None:
        if is_listed != self.is_listed:
            self.is_listed = is_listed
            self._on_connection()
            self._end_if_idle()

    def submit(self, routing: router_pb2.RoutingRequest, generation: bytes) -> Inbox:
        self._handle += 1
        inbox = self._inboxes[self._handle] = Inbox(self, self._handle)
        self._submits.append(
            router_pb2.Submit(handle=self._handle, routing=routing, generation=generation)
        )
        self._to_send.set()
        return inbox

    def forget(self, inbox: Inbox) -> None:
        if self._inboxes.get(inbox.handle) is not inbox:
            return
        del self._inboxes[inbox.handle]
        unsent = [submit for submit in self._submits if submit.handle != inbox.handle]
        if len(unsent) == len(self._submits):
            self._cancels.append(inbox.handle)
            self._to_send.set()
        self._submits = unsent
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self.is_listed and not self._inboxes and self._call is not None:
            self._is_connected = False
            self._call.cancel()

    async def run(self) -> None:
        """Returns once the router is no longer listed and has none of our requests."""
        while self.is_listed:
            try:
                await self._connect()
                log.info("router session ended", router=self._router.name)
            except TimeoutError:
                log.warning("router not reached", **self._facts, seconds=CONNECT_SECONDS)
                self._channels.failed(self._router.address, "router")
            except grpc.aio.AioRpcError as error:
                log.warning(
                    "router session broke",
                    **self._facts,
                    status=error.code().name,
                    error=error.details(),
                )
                self._channels.failed(self._router.address, "router", error)
            except (ProtocolViolation, DecodeError) as error:
                log.error("router broke the protocol", router=self._router.name, error=str(error))
            if self.is_listed:
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _connect(self) -> None:
        async with self._channels.open(self._router.address, "router") as channel:
            async with asyncio.timeout(CONNECT_SECONDS):
                await channel.channel_ready()
            if self.is_listed:
                await self._exchange(RouterServiceStub(channel).Session())

    async def _exchange(self, call: _Call) -> None:
        """Returns or raises when the stream ends, with no request left on it."""
        self._call = call
        self._is_connected = True
        self._on_connection()
        log.info("router session started", router=self._router.name)
        responses = Rounds[router_pb2.SessionResponse]()
        try:
            async with background(self._write(call)), background(_read(call, responses)):
                async for arrived in responses.each():
                    for response in arrived:
                        self._deliver(response)
                    self._consumed_responses += len(arrived)
                    self._to_send.set()  # So that the router may send as many again.
        finally:
            call.cancel()
            self._call = None
            self._is_connected = False
            self._on_connection()
            self._reset()

    def _reset(self) -> None:
        """Fails what was on the stream, and starts counting anew."""
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox.fail(WorkerLost(f"the session with {self._router.name} broke"))
        self._submits, self._cancels = [], []
        self._consumed_responses = 0

    async def _write(self, call: _Call) -> None:
        """The one writer: what is waiting goes into one message once the last one has gone."""
        # When the stream breaks the reader hears of it too, and tells.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(router_pb2.SessionRequest(window_responses=self._window_responses))
            while True:
                await self._to_send.wait()
                await asyncio.sleep(0)  # What begins in this turn of the event loop goes along.
                self._to_send.clear()
                submits = self._take_submits()
                cancels, self._cancels = self._cancels, []
                await call.write(
                    router_pb2.SessionRequest(
                        consumed_responses=self._consumed_responses,
                        submits=submits,
                        cancels=cancels,
                    )
                )

    def _take_submits(self) -> list[router_pb2.Submit]:
        """What goes into the next message: all, unless they are many long prompts."""
        size_bytes = 0
        for count, submit in enumerate(self._submits, start=1):
            size_bytes += len(submit.generation)
            if size_bytes > BATCH_BYTES and count < len(self._submits):
                self._to_send.set()
                break
        else:
            count = len(self._submits)
        taken, self._submits = self._submits[:count], self._submits[count:]
        return taken

    def _deliver(self, response: router_pb2.SessionResponse) -> None:
        for routed in response.routed:
            if (inbox := self._inboxes.get(routed.handle)) is not None:
                inbox.routed = routed
        for data in response.outputs:
            self._deliver_outputs(outputs_pb2.StepOutputs.FromString(data))
        for failure in response.failures:
            if (inbox := self._inboxes.pop(failure.handle, None)) is not None:
                inbox.fail(grpc_errors.from_message(failure.error), failure.failed_instance_id)
        self._end_if_idle()

    def _deliver_outputs(self, outputs: outputs_pb2.StepOutputs) -> None:
        inboxes = self._inboxes
        for start in outputs.starts:
            if (inbox := inboxes.get(start.handle)) is not None:
                inbox.start = start
        tokens = list(outputs.token_ids)
        if not outputs.token_counts:
            if len(outputs.handles) != len(tokens):
                raise ProtocolViolation("outputs have not one token for each handle")
            for handle, token in zip(outputs.handles, tokens, strict=True):
                if (inbox := inboxes.get(handle)) is not None:
                    inbox.put(token)
        else:
            if len(outputs.handles) != len(outputs.token_counts):
                raise ProtocolViolation("outputs have not one count for each handle")
            begin = 0
            for handle, count in zip(outputs.handles, outputs.token_counts, strict=True):
                if (inbox := inboxes.get(handle)) is not None:
                    inbox.put_many(tokens[begin : begin + count])
                begin += count
        if outputs.HasField("logprobs"):
            for handle, positions in positions_of(outputs.logprobs):
                if (inbox := inboxes.get(handle)) is not None:
                    inbox.put_logprobs(positions)
        if outputs.HasField("prompt_logprobs"):
            for handle, positions in positions_of(outputs.prompt_logprobs):
                if (inbox := inboxes.get(handle)) is not None:
                    inbox.prompt_logprobs = positions
        for pooled in outputs.pooled:
            if (inbox := inboxes.get(pooled.handle)) is not None:
                inbox.pooled = pooled.values
        for finish in outputs.finishes:
            if (inbox := inboxes.pop(finish.handle, None)) is not None:
                inbox.finish(finish)


async def _read(call: _Call, responses: Rounds[router_pb2.SessionResponse]) -> None:
    error = None
    try:
        async for response in call:
            responses.put(response)
    except (grpc.aio.AioRpcError, DecodeError) as failure:
        error = failure
    finally:
        # When the call is cancelled, because it is of no more use, it ends as well.
        responses.end(error)
