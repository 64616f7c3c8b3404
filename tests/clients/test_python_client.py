"""The Python client against a real server that fails as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from libs.common.errors import InvalidRequest, NoLiveInstance, Overloaded, SwitchgearError
from libs.common.grpc_server import serving
from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from switchgear_client import Client, reason_of, retry_after_seconds

STOP = generation_pb2.FINISH_REASON_STOP


class Server(InferenceServiceServicer):
    """Fails once for each of `failures`, then answers with "one", " two" and the end."""

    def __init__(self, failures: list[SwitchgearError | None]) -> None:
        self.failures = failures
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.embed_requests: list[inference_pb2.EmbedRequest] = []
        self.authorizations: list[str] = []
        self.cancelled = asyncio.Event()
        self.fails_after_text: SwitchgearError | None = None
        self.hangs_after_text = False

    def _begin(self, context: grpc.aio.ServicerContext[object, object]) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self.authorizations.append(str(metadata.get("authorization", "")))
        if self.failures and (failure := self.failures.pop(0)):
            raise failure

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self._begin(context)
        yield inference_pb2.GenerateResponse(text="one")
        if self.fails_after_text is not None:
            raise self.fails_after_text
        if self.hangs_after_text:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        usage = inference_pb2.Usage(prompt_tokens=1, completion_tokens=2)
        yield inference_pb2.GenerateResponse(text=" two", finish_reason=STOP, usage=usage)

    async def Embed(
        self,
        request: inference_pb2.EmbedRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> inference_pb2.EmbedResponse:
        self._begin(context)
        self.embed_requests.append(request)
        vectors = [[0.5, float(index)] for index in range(len(request.inputs))]
        return inference_pb2.EmbedResponse(
            embeddings=[inference_pb2.Embedding(values=values) for values in vectors]
        )

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> inference_pb2.ListModelsResponse:
        self._begin(context)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(model="m")])


@asynccontextmanager
async def calling(
    *failures: SwitchgearError | None, **options: object
) -> AsyncIterator[tuple[Server, Client]]:
    servicer = Server(list(failures))  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        add_InferenceServiceServicer_to_server(servicer, server)

    make: Callable[..., Client] = Client
    async with (
        serving("127.0.0.1", 0, add, [], grace_seconds=0) as server,
        make(f"127.0.0.1:{server.port}", **options) as client,
    ):
        yield servicer, client


async def test_text_messages_and_tokens_are_prompts() -> None:
    async with calling(api_key="secret") as (server, client):
        sampling = generation_pb2.SamplingOptions(temperature=0.5)
        answer = await client.complete("m", "Hi", max_tokens=3, stop=["x"], sampling=sampling)
        assert (answer.text, answer.finish_reason) == ("one two", STOP)
        assert answer.usage.completion_tokens == 2
        pieces = [piece async for piece in client.stream("m", [("user", "Hi")])]
        assert pieces == ["one", " two"]
        await client.complete("m", [1, 2, 3])
        text, messages, tokens = server.requests
        assert (text.text, text.stopping.max_tokens, list(text.stop)) == ("Hi", 3, ["x"])
        assert text.sampling.temperature == 0.5
        assert messages.messages.messages[0].role == "user"
        assert list(tokens.token_ids.token_ids) == [1, 2, 3]
        assert set(server.authorizations) == {"Bearer secret"}


async def test_what_nobody_took_is_asked_again_when_the_server_says() -> None:
    busy = Overloaded("busy", retry_after_seconds=0.01)
    async with calling(busy, NoLiveInstance("nobody"), None, busy) as (server, client):
        assert (await client.complete("m", "Hi")).text == "one two"
        assert len(server.requests) == 3
        assert [model.model for model in await client.models()] == ["m"]


async def test_texts_and_tokens_are_embedded_in_order() -> None:
    busy = Overloaded("busy", retry_after_seconds=0.01)
    async with calling(busy, api_key="secret") as (server, client):
        vectors = await client.embed("m", ["Hi", [1, 2]], dimensions=2, truncate_tokens=5)
        assert vectors == [[0.5, 0.0], [0.5, 1.0]]
        [request] = server.embed_requests
        assert request.inputs[0].text == "Hi"
        assert list(request.inputs[1].token_ids.token_ids) == [1, 2]
        assert (request.dimensions, request.truncate_tokens) == (2, 5)
        assert set(server.authorizations) == {"Bearer secret"}


async def test_attempts_are_limited() -> None:
    busy = [Overloaded("busy", retry_after_seconds=0.001) for _ in range(9)]
    async with calling(*busy, max_attempts=3) as (server, client):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.complete("m", "Hi")
        assert reason_of(raised.value) == "OVERLOADED"
        assert retry_after_seconds(raised.value) == 0.001
        assert len(server.requests) == 3


async def test_a_pause_that_would_outlast_the_deadline_is_not_begun() -> None:
    busy = Overloaded("busy", retry_after_seconds=3600)
    async with calling(busy, deadline_seconds=60) as (server, client):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.complete("m", "Hi")
        assert retry_after_seconds(raised.value) == 3600
        assert len(server.requests) == 1


async def test_a_bad_request_is_not_asked_again() -> None:
    async with calling(InvalidRequest("wrong", param="stop")) as (server, client):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.complete("m", "Hi")
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert len(server.requests) == 1


async def test_nothing_is_asked_again_after_text_has_come() -> None:
    async with calling() as (server, client):
        server.fails_after_text = NoLiveInstance("gone")
        pieces = client.stream("m", "Hi")
        assert await anext(pieces) == "one"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(pieces)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert len(server.requests) == 1


async def test_the_deadline_ends_a_call() -> None:
    async with calling(deadline_seconds=0.3) as (server, client):
        server.hangs_after_text = True
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.complete("m", "Hi")
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_leaving_the_loop_cancels_the_request() -> None:
    async with calling() as (server, client):
        server.hangs_after_text = True
        messages = client.generate(inference_pb2.GenerateRequest(model="m", text="Hi"))
        async for message in messages:
            assert message.text == "one"
            break
        del messages, message
        async with asyncio.timeout(20):
            await server.cancelled.wait()
