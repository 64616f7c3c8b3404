"""A router without workers behind it: a real gRPC server that answers as a test says."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from libs.common import grpc_errors
from libs.common.errors import SwitchgearError
from libs.common.grpc_server import serving
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2
from switchgear.router.v1.router_pb2_grpc import (
    RouterServiceServicer,
    add_RouterServiceServicer_to_server,
)
from tests.services.frontend import byte_model

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


@dataclass
class Call:
    """One submitted request, as the router sees it."""

    submit: router_pb2.Submit
    generation: generation_pb2.Generation
    session: FrontendSession
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def handle(self) -> int:
        return self.submit.handle

    def route(self, decode: str = "decode-0", prefill: str = "", prefill_cached: int = 0) -> None:
        """Tells who serves it. A worker's id is made from its name."""
        routed = router_pb2.Routed(
            handle=self.handle, decode_worker=_worker(decode), prefill_cached_tokens=prefill_cached
        )
        if prefill:
            routed.prefill_worker.CopyFrom(_worker(prefill))
        self.session.send(router_pb2.SessionResponse(routed=[routed]))

    def send(
        self,
        tokens: Sequence[int] = (),
        finish: generation_pb2.FinishReason.ValueType | None = None,
        *,
        starts: bool = False,
        cached: int = 0,
        transferred: int = 0,
        error: SwitchgearError | None = None,
    ) -> None:
        """Tokens, and the end, in one step; with the log probabilities that were asked for."""
        outputs = outputs_pb2.StepOutputs()
        if starts:
            outputs.starts.add(
                handle=self.handle, cached_tokens=cached, transferred_tokens=transferred
            )
        if tokens:
            outputs.handles.append(self.handle)
            outputs.token_counts.append(len(tokens))
            outputs.token_ids.extend(tokens)
            asked = self.generation.logprobs
            if asked.HasField("output_alternatives"):
                self._add_logprobs(outputs.logprobs, tokens, asked.output_alternatives)
            if asked.HasField("prompt_alternatives") and starts:
                prompt = self.generation.token_ids[1:]
                self._add_logprobs(outputs.prompt_logprobs, prompt, asked.prompt_alternatives)
        if finish is not None:
            finished = outputs.finishes.add(handle=self.handle, reason=finish)
            if error is not None:
                finished.error.CopyFrom(grpc_errors.to_message(error))
        self.session.send(router_pb2.SessionResponse(outputs=[outputs.SerializeToString()]))

    def pool(self, vector: bytes, *, cached: int = 0) -> None:
        """What the prompt was pooled into, and the end."""
        outputs = outputs_pb2.StepOutputs()
        outputs.starts.add(handle=self.handle, cached_tokens=cached)
        outputs.pooled.add(handle=self.handle, values=vector)
        outputs.finishes.add(handle=self.handle, reason=STOP)
        self.session.send(router_pb2.SessionResponse(outputs=[outputs.SerializeToString()]))

    def _add_logprobs(
        self, columns: outputs_pb2.Logprobs, tokens: Sequence[int], alternatives: int
    ) -> None:
        columns.handles.append(self.handle)
        columns.position_counts.append(len(tokens))
        columns.candidate_counts.append(1 + alternatives)
        for token in tokens:
            for candidate, logprob in made_up_logprobs(token, alternatives):
                columns.token_ids.append(candidate)
                columns.logprobs.append(logprob)

    def fail(self, error: SwitchgearError, failed: str = "") -> None:
        """Ends the request outside an engine."""
        failure = router_pb2.Failure(
            handle=self.handle,
            error=grpc_errors.to_message(error),
            failed_instance_id=worker_id(failed) if failed else 0,
        )
        self.session.send(router_pb2.SessionResponse(failures=[failure]))


def made_up_logprobs(token: int, alternatives: int) -> list[tuple[int, float]]:
    """Every token is the second likeliest, behind the one before it."""
    likeliest = [(token - 1, -0.25), (token, -0.5), *((token + i, -1.0 - i) for i in range(1, 20))]
    return [(token, -0.5), *likeliest[:alternatives]]


Behaviour = Callable[[Call], Awaitable[None]]


class FrontendSession:
    """One frontend's stream."""

    def __init__(self) -> None:
        self.requests: list[router_pb2.SessionRequest] = []
        self._responses: asyncio.Queue[router_pb2.SessionResponse | None] = asyncio.Queue()

    def send(self, response: router_pb2.SessionResponse) -> None:
        self._responses.put_nowait(response)

    def end(self) -> None:
        """As when the process dies, after what was sent."""
        self._responses.put_nowait(None)

    async def next_response(self) -> router_pb2.SessionResponse | None:
        return await self._responses.get()


class FakeRouter(RouterServiceServicer):
    """Answers each request by a behaviour; remembers what it was told."""

    def __init__(self, behaviour: Behaviour, name: str) -> None:
        self.behaviour = behaviour
        self.instance = discovery_pb2.Instance(
            instance_id=worker_id(name), role=discovery_pb2.ROLE_ROUTER, name=name
        )
        self.calls: list[Call] = []
        self.sessions: list[FrontendSession] = []

    @property
    def cancelled_handles(self) -> list[int]:
        return [call.handle for call in self.calls if call.cancelled.is_set()]

    def break_sessions(self) -> None:
        """As when the process dies."""
        for session in self.sessions:
            session.end()

    async def Session(  # type: ignore[override]
        self,
        requests: AsyncIterator[router_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[router_pb2.SessionRequest, router_pb2.SessionResponse],
    ) -> None:
        session = FrontendSession()
        self.sessions.append(session)
        reading = asyncio.create_task(self._read(session, requests))
        try:
            while (response := await session.next_response()) is not None:
                await context.write(response)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the router is gone")

    async def _read(
        self, session: FrontendSession, requests: AsyncIterator[router_pb2.SessionRequest]
    ) -> None:
        calls: dict[int, Call] = {}
        running: list[asyncio.Task[None]] = []
        try:
            async for request in requests:
                session.requests.append(request)
                for submit in request.submits:
                    assert submit.handle not in calls
                    generation = generation_pb2.Generation.FromString(submit.generation)
                    call = calls[submit.handle] = Call(submit, generation, session)
                    self.calls.append(call)
                    running.append(asyncio.create_task(self._behave(call)))
                for handle in request.cancels:
                    calls[handle].cancelled.set()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _behave(self, call: Call) -> None:
        await self.behaviour(call)


@asynccontextmanager
async def fake_router(behaviour: Behaviour, name: str = "router-0") -> AsyncIterator[FakeRouter]:
    """Runs a router while the body runs."""
    router = FakeRouter(behaviour, name)  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        add_RouterServiceServicer_to_server(router, server)

    async with serving("127.0.0.1", 0, add, [], grace_seconds=0) as server:
        router.instance.address = f"127.0.0.1:{server.port}"
        yield router


def says(
    text: str, *, tokens_per_step: int = 1, finish: generation_pb2.FinishReason.ValueType = STOP
) -> Behaviour:
    """Answers with a text, step by step, and the end-of-sequence token."""

    async def behave(call: Call) -> None:
        call.route()
        answer = byte_model.tokens(text)
        if finish == STOP:
            answer.append(byte_model.END_TOKEN)
        limit = call.generation.stopping.max_tokens
        reason = LENGTH if len(answer) > limit else finish
        answer = answer[:limit]
        for begin in range(0, len(answer), tokens_per_step):
            end = begin + tokens_per_step
            is_last = end >= len(answer)
            call.send(answer[begin:end], reason if is_last else None, starts=begin == 0)
            await asyncio.sleep(0)

    return behave


def embeds(dimensions: int = 8) -> Behaviour:
    """Answers with the vector of the prompt, see `vector`."""

    async def behave(call: Call) -> None:
        call.route()
        call.pool(vector(list(call.generation.token_ids), dimensions))

    return behave


def vector(prompt: Sequence[int], dimensions: int = 8) -> bytes:
    """Numbers that tell one prompt from another, as 32-bit floats."""
    floats = [len(prompt), sum(prompt) / 7, *prompt[: dimensions - 2]]
    return struct.pack(f"<{dimensions}f", *floats, *[0.0] * (dimensions - len(floats)))


async def never_answers(call: Call) -> None:
    """Takes a request and does nothing with it."""
    call.route()
    await call.cancelled.wait()


def worker_id(name: str) -> int:
    """The id of the worker of that name."""
    return int.from_bytes(name.encode()[:8].ljust(8, b"."), "little")


def _worker(name: str) -> router_pb2.WorkerRef:
    return router_pb2.WorkerRef(instance_id=worker_id(name), name=name)
