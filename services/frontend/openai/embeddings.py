"""/v1/embeddings as OpenAI has it, and vLLM's /pooling: bodies and answers."""

from __future__ import annotations

import asyncio
import base64
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, model_validator
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from libs.common.errors import SwitchgearError
from services.frontend.chat_template import Chat
from services.frontend.embedding import MAX_INPUTS, floats_of
from services.frontend.openai.exchange import Exchange, exchange_of
from services.frontend.openai.generation import last_write
from services.frontend.openai.messages import ChatMessage, for_template
from services.frontend.openai.schema import MAX_SALT_CHARACTERS, prompts_of
from services.frontend.openai.strict import Strict
from services.frontend.pipeline import (
    EmbeddingOptions,
    Pipeline,
    Prompt,
    new_request_id,
)
from services.frontend.watch import ClientLeft, Watch
from switchgear.common.v1 import routing_pb2

PIECE_VALUES = 16_384
"""So many numbers become JSON at a time, in some milliseconds; then others get their turn."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "padding": ("do_not_pad",),
    "use_activation": (True,),
}
"""vLLM's fields that are not offered, with the values at which they ask for nothing."""

IGNORED = frozenset({"request_id"})


def _inputs(value: object) -> object:
    found = prompts_of(value)
    if len(found) > MAX_INPUTS:
        raise ValueError(f"at most {MAX_INPUTS} inputs in one request, got {len(found)}")
    for index, one in enumerate(found):
        if not one:
            raise ValueError(f"input {index} is empty" if len(found) > 1 else "must not be empty")
    return found


class _InputBody(Strict):
    """What both endpoints take. Absent and null are the same."""

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[list[str] | list[list[int]] | None, BeforeValidator(_inputs)] = None
    """One of this and `messages`."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)
    """For models that are trained to have their vectors cut short."""
    user: str | None = None
    """For the caller's own books: checked, and kept nowhere."""

    # vLLM's extensions.
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    """One input, put through the model's chat template."""
    add_generation_prompt: bool = False
    add_special_tokens: bool = True
    """Whether texts get the special tokens that the model wants around one."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=2**31)
    """Longer inputs are cut to so many tokens; -1: to the context."""
    truncation_side: Literal["left", "right"] | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARACTERS)

    @model_validator(mode="after")
    def _has_one_input(self) -> _InputBody:
        if (self.input is None) == (self.messages is None):
            raise ValueError("exactly one of input and messages is required")
        return self

    def inputs(self) -> Sequence[Prompt]:
        """Each becomes one vector."""
        if self.messages is not None:
            chat = Chat(for_template(self.messages), begins_answer=self.add_generation_prompt)
            return [chat]
        return self.input or []

    def options(self) -> EmbeddingOptions:
        return EmbeddingOptions(
            input_param="input" if self.messages is None else "messages",
            dimensions=self.dimensions,
            truncate_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            adds_special_tokens=self.add_special_tokens,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )

    @property
    @abstractmethod
    def id_prefix(self) -> str:
        """What the answer's id begins with."""

    @abstractmethod
    def head(self, answer_id: str) -> dict[str, Any]:
        """The answer's fields before its data."""

    @abstractmethod
    def item(self, index: int, vector: bytes) -> bytes:
        """One vector's place in the data, as JSON, from the vector's."""


class EmbeddingBody(_InputBody):
    """POST /v1/embeddings."""

    @property
    def id_prefix(self) -> str:
        return "embd"

    def head(self, answer_id: str) -> dict[str, Any]:
        return {"object": "list"}

    def item(self, index: int, vector: bytes) -> bytes:
        return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector)


def _offered_task(value: object) -> object:
    if value != "embed":
        raise ValueError(f"only 'embed' is offered, not {str(value)[:100]!r}")
    return value


class PoolingBody(_InputBody):
    """POST /pooling."""

    task: Annotated[Literal["embed"], BeforeValidator(_offered_task)]
    """Has to be said: vLLM's own default is a vector for each token."""

    @property
    def id_prefix(self) -> str:
        return "pool"

    def head(self, answer_id: str) -> dict[str, Any]:
        return {"id": answer_id, "object": "list", "created": int(time.time())}

    def item(self, index: int, vector: bytes) -> bytes:
        return b'{"index":%d,"object":"pooling","data":%b}' % (index, vector)


class EmbeddingResponse(Response):
    """Runs a request when it is sent."""

    def __init__(
        self,
        pipeline: Pipeline,
        body: _InputBody,
        *,
        routing: routing_pb2.RoutingOptions | None,
    ) -> None:
        self.background = None
        self._pipeline = pipeline
        self._body = body
        self._answer_id = new_request_id(body.id_prefix)
        self._routing = routing
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            last = await self._run(scope, send)
        except ClientLeft:
            self._pipeline.metrics.disconnects.inc()
            return
        except SwitchgearError as error:
            if self._is_started:
                # Of a client that reads too slowly: the server breaks off what has no end.
                return
            if error.param == "token_ids":
                error.param = "input"
            raise
        with last_write():
            await send({"type": "http.response.body", "body": last})

    async def _run(self, scope: Scope, send: Send) -> bytes:
        """Sends the answer up to its last piece, which it returns."""
        accepted_at = asyncio.get_running_loop().time()
        deadline = accepted_at + self._pipeline.settings.request_timeout_seconds
        exchange = exchange_of(scope)
        exchange.answer_id = self._answer_id
        with self._pipeline.admitted(exchange.caller), Watch(deadline, exchange.connection):
            return await self._send_most(await self._embed(exchange, accepted_at, deadline), send)

    async def _embed(
        self, exchange: Exchange, accepted_at: float, deadline: float
    ) -> Iterator[bytes]:
        """The answer, in pieces."""
        pipeline, body = self._pipeline, self._body
        caller, options = exchange.caller, body.options()
        exchange.model = pipeline.models.canonical_name(body.model)
        model = pipeline.model_for(caller, body.model)
        model.check_embeds()
        embedding = pipeline.start_embedding(
            self._answer_id,
            model,
            await pipeline.tokenise_inputs(model, body.inputs(), options),
            options,
            caller=caller,
            traceparent=exchange.traceparent,
            routing=self._routing,
            accepted_at=accepted_at,
            deadline=deadline,
        )
        vectors = await embedding.run()
        tokens = embedding.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return self._pieces(vectors, {"model": model.name, "usage": usage})

    async def _send_most(self, pieces: Iterator[bytes], send: Send) -> bytes:
        """All but the last piece, which it returns."""
        piece = next(pieces)
        headers = [(b"content-type", b"application/json")]
        for following in pieces:
            if not self._is_started:
                await self._start(send, headers)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
            piece = following
        if not self._is_started:
            headers.append((b"content-length", str(len(piece)).encode()))
            await self._start(send, headers)
        return piece

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _pieces(self, vectors: Sequence[bytes], end: Mapping[str, Any]) -> Iterator[bytes]:
        """The answer's JSON, made piece by piece."""
        body = self._body
        step = max(1, 4 * PIECE_VALUES // len(vectors[0]))
        before = orjson.dumps(body.head(self._answer_id))[:-1] + b',"data":['
        for begin in range(0, len(vectors), step):
            items = [
                body.item(index, _json_of(vector, body.encoding_format))
                for index, vector in enumerate(vectors[begin : begin + step], begin)
            ]
            is_last = begin + step >= len(vectors)
            after = b"]," + orjson.dumps(end)[1:] if is_last else b""
            yield before + b",".join(items) + after
            before = b","


def _json_of(vector: bytes, encoding_format: str) -> bytes:
    if encoding_format == "base64":
        return b'"%b"' % base64.b64encode(vector)
    return orjson.dumps(floats_of(vector).tolist())
