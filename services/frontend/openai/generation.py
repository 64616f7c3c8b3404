"""Answers to the two generating endpoints, streamed or whole.

Headers go out with the first tokens, so that what fails before has its own HTTP status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from libs.common import logs
from libs.common.errors import SwitchgearError
from libs.common.tasks import background
from services.frontend.completion import Completion, running
from services.frontend.openai.errors import api_error_of, internal_error
from services.frontend.openai.exchange import exchange_of
from services.frontend.openai.formats import Format, error_event
from services.frontend.openai.schema import ChatBody, CompletionBody
from services.frontend.pipeline import Pipeline, Prompt, new_request_id, time_limit
from switchgear.common.v1 import routing_pb2

log = logs.get(__name__)

LAST_WRITE_SECONDS = 10
"""For the end of an answer to a client that reads slowly or not at all."""


class ClientLeft(Exception):
    """The client closed its connection before its answer was complete."""


class GenerationResponse(Response):
    """Runs a request when it is sent."""

    def __init__(
        self,
        pipeline: Pipeline,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        format_class: type[Format],
        *,
        traceparent: str,
        routing: routing_pb2.RoutingOptions | None,
    ) -> None:
        self.background = None
        self._pipeline = pipeline
        self._body = body
        self._prompts = prompts
        self._format_class = format_class
        self._answer_id = new_request_id(format_class.id_prefix)
        self._traceparent = traceparent
        self._routing = routing
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with _until_client_leaves(receive):
                last = await self._generate(scope, send)
        except ClientLeft:
            self._pipeline.metrics.disconnects.inc()
            return
        except SwitchgearError as error:
            if not self._is_started:
                raise
            last = error_event(api_error_of(error).body)
        except Exception:  # A bug, which must not look like the end of the text.
            if not self._is_started:
                raise
            log.exception("stream failed", request_id=self._answer_id)
            last = error_event(internal_error().body)
        # A client that never reads does not get to see its end.
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WRITE_SECONDS):
                await send({"type": "http.response.body", "body": last})

    async def _generate(self, scope: Scope, send: Send) -> bytes:
        """Sends the answer up to its last bytes, which it returns."""
        pipeline, body = self._pipeline, self._body
        accepted_at = asyncio.get_running_loop().time()
        deadline = accepted_at + pipeline.settings.request_timeout_seconds
        with pipeline.admitted(), ExitStack() as completions_running:
            async with time_limit(deadline):
                exchange_of(scope).model = pipeline.models.canonical_name(body.model)
                model = pipeline.models.get(body.model)
                completions = []
                for index, prompt in enumerate(self._prompts):
                    completion = pipeline.start(
                        f"{self._answer_id}-{index}" if index else self._answer_id,
                        model,
                        await pipeline.tokenise(model, prompt),
                        body.options(),
                        traceparent=self._traceparent,
                        routing=self._routing,
                        accepted_at=accepted_at,
                        deadline=deadline,
                    )
                    completions_running.enter_context(running(completion, pipeline.metrics))
                    completions.append(completion)
                answer = self._format_class(
                    self._answer_id,
                    model.name,
                    int(time.time()),
                    includes_usage=body.includes_usage,
                )
                if body.stream:
                    return await self._stream(completions[0], answer, scope, send)
                return await self._whole(completions, answer, send)

    async def _stream(
        self, completion: Completion, answer: Format, scope: Scope, send: Send
    ) -> bytes:
        text = await completion.read()
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._start(send, headers, completion)
        send = exchange_of(scope).send
        chunk = answer.first_chunk()
        while True:
            if text:
                chunk += answer.text_chunk(text)
            if completion.is_finished:
                return chunk + answer.last_chunks(completion)
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            text = await completion.read()
            chunk = b""

    async def _whole(self, completions: Sequence[Completion], answer: Format, send: Send) -> bytes:
        if len(completions) == 1:
            texts = [await _read_all(completions[0])]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    reading = [group.create_task(_read_all(one)) for one in completions]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            texts = [task.result() for task in reading]
        whole = answer.whole(completions, texts)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(whole)).encode()),
        ]
        await self._start(send, headers, completions[0])
        return whole

    async def _start(
        self, send: Send, headers: list[tuple[bytes, bytes]], completion: Completion
    ) -> None:
        if completion.prefill_worker:
            headers.append((b"x-switchgear-prefill-worker", completion.prefill_worker.encode()))
        if completion.decode_worker:
            headers.append((b"x-switchgear-decode-worker", completion.decode_worker.encode()))
        self._is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _read_all(completion: Completion) -> str:
    texts = []
    while not completion.is_finished:
        texts.append(await completion.read())
    return "".join(texts)


@asynccontextmanager
async def _until_client_leaves(receive: Receive) -> AsyncIterator[None]:
    """Raises ClientLeft in the body when the client closes its connection.

    The body must not send the end of the answer, after which servers report the client as gone.
    """
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    async with background(watch()):
        try:
            yield
        except asyncio.CancelledError:
            if has_left and task.uncancel() == 0:
                raise ClientLeft from None
            raise
