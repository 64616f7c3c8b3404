"""A client with a deadline, an API key, and retries where they do no harm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import InferenceServiceStub

Prompt: TypeAlias = str | Sequence[tuple[str, str]] | Sequence[int]
"""A text, messages as (role, content), or token ids."""

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0

_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    # Finds a server whose host is gone. Servers take a ping every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]

_Call: TypeAlias = grpc.aio.UnaryStreamCall[
    inference_pb2.GenerateRequest, inference_pb2.GenerateResponse
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: generation_pb2.FinishReason.ValueType
    usage: inference_pb2.Usage


class Client:
    """One connection, for any number of concurrent calls. Use it as an async context manager."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        deadline_seconds: float = 300.0,
        max_attempts: int = 4,
    ) -> None:
        """`address` is host:port. Without `credentials`, such as
        `grpc.ssl_channel_credentials()`, the connection, with the API key, is not encrypted.
        `server_name` is what the server's certificate must say when that is not the host, such as
        frontend.switchgear. `deadline_seconds` is for each call, retries included."""
        name = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        self._channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=[*_OPTIONS, *name])
        )
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self.stub = InferenceServiceStub(self._channel)
        """For what this class does not offer; send `metadata` along."""
        self._deadline_seconds = deadline_seconds
        self._max_attempts = max_attempts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The messages of an answer as they come. Leaving the loop cancels the request.

        The call is made again only while no message has come.
        """
        deadline = self._deadline()

        async def begin() -> tuple[_Call, object]:
            call: _Call = self.stub.Generate(
                request, metadata=self.metadata, timeout=_left_seconds(deadline)
            )
            try:
                return call, await call.read()
            except BaseException:
                call.cancel()
                raise

        call, message = await self._retried(begin, deadline)
        try:
            while isinstance(message, inference_pb2.GenerateResponse):
                yield message
                message = await call.read()
        finally:
            call.cancel()

    async def stream(
        self,
        model: str,
        prompt: Prompt,
        *,
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        sampling: generation_pb2.SamplingOptions | None = None,
    ) -> AsyncIterator[str]:
        """The text of an answer as it comes. `max_tokens` 0 is as many as fit into the context."""
        async for message in self.generate(_request(model, prompt, max_tokens, stop, sampling)):
            if message.text:
                yield message.text

    async def complete(
        self,
        model: str,
        prompt: Prompt,
        *,
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        sampling: generation_pb2.SamplingOptions | None = None,
    ) -> Answer:
        """The whole answer."""
        texts = []
        last = inference_pb2.GenerateResponse()
        async for last in self.generate(_request(model, prompt, max_tokens, stop, sampling)):
            texts.append(last.text)
        return Answer("".join(texts), last.finish_reason, last.usage)

    async def embed(
        self,
        model: str,
        inputs: Sequence[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        truncate_tokens: int | None = None,
    ) -> list[list[float]]:
        """A vector of length 1 for each text or list of token ids, in order.

        `dimensions` is for models that are trained to have vectors cut short. Longer inputs keep
        `truncate_tokens`; without it they are refused.
        """
        request = inference_pb2.EmbedRequest(
            model=model,
            inputs=[
                inference_pb2.EmbedInput(text=one)
                if isinstance(one, str)
                else inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(token_ids=one))
                for one in inputs
            ],
            dimensions=dimensions,
            truncate_tokens=truncate_tokens,
        )
        response = await self._call(self.stub.Embed, request)
        return [list(embedding.values) for embedding in response.embeddings]

    async def models(self) -> list[inference_pb2.Model]:
        """The models that can be served now."""
        request = inference_pb2.ListModelsRequest()
        return list((await self._call(self.stub.ListModels, request)).models)

    async def tokenize(self, model: str, prompt: str | Sequence[tuple[str, str]]) -> list[int]:
        """The tokens that `generate` would make of a text or of messages."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.messages.CopyFrom(_messages(prompt))
        return list((await self._call(self.stub.Tokenize, request)).token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._call(self.stub.Detokenize, request)).text

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        deadline = self._deadline()

        async def once() -> T:
            return await method(request, metadata=self.metadata, timeout=_left_seconds(deadline))

        return await self._retried(once, deadline)

    async def _retried(self, once: Callable[[], Awaitable[T]], deadline: float) -> T:
        loop = asyncio.get_running_loop()
        exponential = wait_random_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)

        def pause_seconds(state: RetryCallState) -> float:
            told = retry_after_seconds(_error_of(state))
            return exponential(state) if told is None else told

        few = stop_after_attempt(self._max_attempts)

        def is_enough(state: RetryCallState) -> bool:
            return few(state) or loop.time() + state.upcoming_sleep >= deadline

        attempts = AsyncRetrying(
            retry=retry_if_exception(_is_retryable),
            wait=pause_seconds,
            stop=is_enough,
            reraise=True,
        )
        return await attempts(once)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._deadline_seconds


def _left_seconds(deadline: float) -> float:
    return max(0.0, deadline - asyncio.get_running_loop().time())


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The stable name of a failure, such as MODEL_NOT_FOUND; empty when there is none."""
    info = error_details_pb2.ErrorInfo()
    return info.reason if _unpack(error, info) else ""


def retry_after_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """When the server says to come back; None when it does not say."""
    retry = error_details_pb2.RetryInfo()
    if not _unpack(error, retry):
        return None
    return float(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)


def _unpack(
    error: grpc.aio.AioRpcError,
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo,
) -> bool:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    return status is not None and any(packed.Unpack(detail) for packed in status.details)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _RETRYABLE


def _error_of(state: RetryCallState) -> grpc.aio.AioRpcError:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    return error


def _request(
    model: str,
    prompt: Prompt,
    max_tokens: int,
    stop: Sequence[str],
    sampling: generation_pb2.SamplingOptions | None,
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        model=model,
        stop=stop,
        sampling=sampling,
        stopping=generation_pb2.StoppingOptions(max_tokens=max_tokens),
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], int):
        request.token_ids.token_ids.extend(prompt)  # type: ignore[arg-type]
    else:
        request.messages.CopyFrom(_messages(prompt))  # type: ignore[arg-type]
    return request


def _messages(messages: Sequence[tuple[str, str]]) -> inference_pb2.Messages:
    return inference_pb2.Messages(
        messages=[inference_pb2.Message(role=role, content=content) for role, content in messages]
    )
