"""Answers to the generating endpoints, streamed or whole.

Headers go out with the first tokens, so that what fails before has its own HTTP status; a stream
that has none for long starts without.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from libs.common import logs
from libs.common.errors import DeadlineExceeded, SwitchgearError
from services.frontend.completion import Completion, running
from services.frontend.openai.choices import Choice, merged
from services.frontend.openai.dialect import Dialect
from services.frontend.openai.errors import api_error_of, internal_error
from services.frontend.openai.exchange import exchange_of
from services.frontend.openai.formats import Answer, usage_of
from services.frontend.openai.keep_alive import COMMENT, KeepAlive
from services.frontend.openai.schema import ChatBody, CompletionBody
from services.frontend.pipeline import Pipeline, Prompt, new_request_id
from services.frontend.watch import ClientLeft, Watch
from switchgear.common.v1 import routing_pb2

log = logs.get(__name__)

LAST_WRITE_SECONDS = 10
"""For the end of an answer to a client that reads slowly or not at all."""


class GenerationResponse(Response):
    """Runs a request when it is sent."""

    def __init__(
        self,
        pipeline: Pipeline,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        dialect: Dialect,
        *,
        routing: routing_pb2.RoutingOptions | None,
        before_end: Callable[[], Awaitable[None]] | None = None,
        place: AbstractContextManager[object] | None = None,
    ) -> None:
        """`before_end` runs once the answer is complete, before its end is written. `place` is what
        the pipeline admitted the request to; None when it is still to be asked."""
        self.background = None
        self._pipeline = pipeline
        self._body = body
        self._prompts = prompts
        self._dialect = dialect
        self._answer_id = new_request_id(dialect.id_prefix)
        self._routing = routing
        self._before_end = before_end
        self._place = place
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            last = await self._generate(scope, send)
        except ClientLeft:
            self._pipeline.metrics.disconnects.inc()
            return
        except SwitchgearError as error:
            error.param = self._body.param_of(error.param)
            if not self._is_started:
                raise
            exchange_of(scope).failure = error
            last = self._dialect.error_event(api_error_of(error))
        except Exception:  # A bug, which must not look like the end of the text.
            if not self._is_started:
                raise
            log.exception("stream failed", request_id=self._answer_id)
            last = self._dialect.error_event(internal_error())
        with last_write():
            await send({"type": "http.response.body", "body": last})

    async def _generate(self, scope: Scope, send: Send) -> bytes:
        """Sends the answer up to its last bytes, which it returns."""
        pipeline, body = self._pipeline, self._body
        accepted_at = asyncio.get_running_loop().time()
        deadline = accepted_at + pipeline.settings.request_timeout_seconds
        exchange = exchange_of(scope)
        exchange.answer_id = self._answer_id
        caller = exchange.caller
        with (
            self._place or pipeline.admitted(caller),
            ExitStack() as completions_running,
            Watch(deadline, exchange.connection),
        ):
            exchange.model = pipeline.models.canonical_name(body.model)
            model = pipeline.model_for(caller, body.model)
            model.check_generates()
            parsing = body.parsing(model) if isinstance(body, ChatBody) else None
            completions: list[Completion] = []
            answer = Answer(
                answer_id=self._answer_id,
                model=model,
                created=int(time.time()),
                service_tier=body.service_tier,
                usage=partial(usage_of, completions, body.n),
                includes_usage=body.includes_usage,
                includes_usage_so_far=body.includes_usage_so_far,
            )
            choices: list[Choice] = []
            for prompt in self._prompts:
                token_ids = await pipeline.tokenise(model, prompt)
                echoed = None
                if body.echoes:
                    echoed = await pipeline.texts(
                        model, token_ids, keeps_special_tokens=not body.skip_special_tokens
                    )
                for number in range(body.n):
                    index = len(choices)
                    options = body.options(number)
                    if parsing is not None and parsing.marks:
                        options = msgspec.structs.replace(options, marks=parsing.marks)
                    completion = pipeline.start(
                        f"{self._answer_id}-{index}" if index else self._answer_id,
                        model,
                        token_ids,
                        options,
                        caller=caller,
                        traceparent=exchange.traceparent,
                        routing=self._routing,
                        accepted_at=accepted_at,
                        deadline=deadline,
                    )
                    completions_running.enter_context(running(completion, pipeline.metrics))
                    completions.append(completion)
                    parsed = None
                    if isinstance(body, ChatBody) and parsing is not None and parsing.is_needed:
                        parsed = body.choice_of(parsing, completion)
                    choices.append(
                        Choice(
                            completion,
                            self._dialect.shape(answer, index, parsed),
                            echoed=echoed,
                            has_logprobs=body.logprob_options is not None,
                        )
                    )
            if body.stream:
                last = await self._stream(choices, scope, send)
                if self._before_end is not None:
                    await self._before_end()
                return last + self._dialect.end_chunks(answer)
            wholes = await _read_all(choices)
            if self._before_end is not None:
                await self._before_end()
            whole = self._dialect.whole_answer(answer, wholes)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(whole)).encode()),
            ]
            await self._start(send, headers, completions[0])
            return whole

    async def _stream(self, choices: Sequence[Choice], scope: Scope, send: Send) -> bytes:
        """Sends the chunks but the last, which it returns."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        send_body = exchange_of(scope).send

        async def send_comment() -> None:
            if not self._is_started:
                await self._start(send, headers, choices[0].completion)
            await send_body({"type": "http.response.body", "body": COMMENT, "more_body": True})

        async with (
            merged(choices) as source,
            KeepAlive(self._pipeline.settings.sse_keep_alive_seconds, send_comment) as keep_alive,
        ):
            chunk = source.chunk_of(await source.read())
            await keep_alive.settled()
            if not self._is_started:
                await self._start(send, headers, choices[0].completion)
            while not source.is_finished:
                if chunk:
                    await send_body(
                        {"type": "http.response.body", "body": chunk, "more_body": True}
                    )
                    keep_alive.sent()
                chunk = source.chunk_of(await source.read())
            return chunk

    async def _start(
        self, send: Send, headers: list[tuple[bytes, bytes]], completion: Completion
    ) -> None:
        if completion.prefill_worker:
            headers.append((b"x-switchgear-prefill-worker", completion.prefill_worker.encode()))
        if completion.decode_worker:
            headers.append((b"x-switchgear-decode-worker", completion.decode_worker.encode()))
        self._is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})


@contextmanager
def last_write() -> Iterator[None]:
    """Writes the end of an answer in the body. A client that never reads does not get to see it."""
    with (
        suppress(DeadlineExceeded),
        Watch(asyncio.get_running_loop().time() + LAST_WRITE_SECONDS),
    ):
        yield


async def _read_all(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    if len(choices) == 1:
        return [await choices[0].read_whole()]
    try:
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(choice.read_whole()) for choice in choices]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in reading]
