"""One request on its way: tokens in, text out, and over to another worker when one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from libs.common import grpc_errors, logs
from libs.common.errors import SwitchgearError
from libs.common.hashing import sequence_hashes
from services.frontend.core.attempt import Attempts, MigrationPolicy
from services.frontend.core.stop_strings import StopMatcher
from services.frontend.metrics import FrontendMetrics
from services.frontend.models import ServedModel
from services.frontend.router_session import Inbox, RouterSessions
from switchgear.common.v1 import generation_pb2, routing_pb2
from switchgear.router.v1 import router_pb2

log = logs.get(__name__)

LONG_PROMPT_TOKENS = 16_384
"""Hashing and serialising more than this takes milliseconds, which belong in a thread."""

HOP_MARGIN_SECONDS = 0.25
"""What the next hop gets less, so that its error arrives before our own deadline; at most a tenth
of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What to generate, checked against the model."""

    request_id: str
    """Unique, unlike what clients may send in x-request-id."""
    model: ServedModel
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    sampling: generation_pb2.SamplingOptions = field(default_factory=generation_pb2.SamplingOptions)
    traceparent: str = ""
    routing: routing_pb2.RoutingOptions | None = None
    accepted_at: float
    """In the event loop's time."""
    deadline: float
    """In the event loop's time."""


class Completion:
    """The text of one request, as it comes. Not for concurrent readers."""

    def __init__(
        self,
        request: TextRequest,
        sessions: RouterSessions,
        policy: MigrationPolicy,
        metrics: FrontendMetrics,
    ) -> None:
        self.request = request
        self.finish_reason = generation_pb2.FINISH_REASON_UNSPECIFIED
        """Set with the last text: STOP or LENGTH."""
        self.cached_tokens = 0
        """Prompt tokens that some worker had cached; known from the first text on."""
        self.prefill_worker = ""
        """Who computed the prompt, when it was not the decode worker."""
        self.decode_worker = ""
        """Who gave the first token."""
        self._sessions = sessions
        self._metrics = metrics
        self._attempts = Attempts(
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            policy=policy,
        )
        self._detokenizer = request.model.tokenizer.detokenizer(request.prompt)
        self._matcher = StopMatcher(request.stop_strings) if request.stop_strings else None
        self._inbox: Inbox | None = None
        self._failure: SwitchgearError | None = None
        self._loop = asyncio.get_running_loop()
        self._last_tokens_at = 0.0
        self._itl = metrics.itl_seconds.labels(request.model.name)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def completion_tokens(self) -> int:
        """Output tokens so far."""
        return len(self._attempts.produced)

    @property
    def is_finished(self) -> bool:
        """The last text has been read."""
        return bool(self.finish_reason)

    async def read(self) -> str:
        """Waits for tokens; their text, which may be empty.

        Raises the SwitchgearError that ended the request, once all text before it has been read.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self._inbox is None:
                self._inbox = await self._submit()
            inbox = self._inbox
            tokens = await inbox.take()
            text = self._absorb(inbox, tokens) if tokens else ""
            if inbox.is_over and not self.is_finished:
                self._inbox = None
                if inbox.error is None or self._attempts.remaining_tokens <= 0:
                    # With an error only the news of the end was lost.
                    self.finish_reason = inbox.finish_reason or generation_pb2.FINISH_REASON_LENGTH
                    return text + (self._matcher.flush() if self._matcher else "")
                await self._recover(inbox.error, inbox.failed_instance_id)
            if tokens:
                return text

    def close(self) -> None:
        """Gives up what is not finished; the engine stops. May be called twice."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    async def _recover(self, error: SwitchgearError, failed_instance_id: int) -> None:
        pause_seconds = self._attempts.pause_after(error, failed_instance_id)
        if pause_seconds is None:
            self._failure = error
            return
        self._metrics.migrations.labels(self.request.model.name, error.reason).inc()
        log.info(
            "request migrates",
            request_id=self.request.request_id,
            reason=error.reason,
            error=error.message,
            failed_instance_id=f"{failed_instance_id:016x}",
            produced_tokens=self.completion_tokens,
        )
        if pause_seconds:
            await asyncio.sleep(pause_seconds)

    async def _submit(self) -> Inbox:
        commands = self._commands
        if len(self.request.prompt) > LONG_PROMPT_TOKENS:
            routing, generation = await asyncio.to_thread(commands)
        else:
            routing, generation = commands()
        if not self._sessions.is_connected:
            await self._sessions.wait_connected(self._attempts.policy.patience_seconds)
        left_seconds = self.request.deadline - self._loop.time()
        margin_seconds = min(HOP_MARGIN_SECONDS, left_seconds / 10)
        routing.timeout.CopyFrom(grpc_errors.duration_of(left_seconds - margin_seconds))
        return self._sessions.submit(routing, generation)

    def _commands(self) -> tuple[router_pb2.RoutingRequest, bytes]:
        request, attempts = self.request, self._attempts
        facts = request.model.facts
        token_ids = attempts.token_ids
        routing = router_pb2.RoutingRequest(
            request_id=request.request_id,
            model=facts.name,
            prompt_tokens=len(token_ids),
            block_size_tokens=facts.kv_block_size_tokens,
            sequence_hashes=sequence_hashes(token_ids, facts.kv_block_size_tokens),
            excluded_instance_ids=attempts.excluded_instance_ids,
            options=request.routing,
        )
        generation = generation_pb2.Generation(
            request_id=request.request_id,
            model=facts.name,
            token_ids=token_ids,
            sampling=request.sampling,
            stopping=generation_pb2.StoppingOptions(
                max_tokens=attempts.remaining_tokens,
                min_tokens=attempts.remaining_min_tokens,
                ignore_eos=request.ignore_eos,
                stop_token_ids=request.stop_token_ids,
            ),
            traceparent=request.traceparent,
        )
        return routing, generation.SerializeToString()

    def _absorb(self, inbox: Inbox, tokens: list[int]) -> str:
        now = self._loop.time()
        if not self._last_tokens_at:
            self._on_first_tokens(inbox, now)
        else:
            self._itl.observe((now - self._last_tokens_at) / len(tokens))
        self._last_tokens_at = now
        ends_with_stop_token = (
            inbox.finish_reason == generation_pb2.FINISH_REASON_STOP
            and tokens[-1] in self.request.stop_token_ids
        )
        text = self._text(tokens[:-1] if ends_with_stop_token else tokens)
        if ends_with_stop_token and not self.is_finished:
            self._attempts.add(tokens[-1:])
        return text

    def _text(self, tokens: list[int]) -> str:
        if self._matcher is None:
            self._attempts.add(tokens)
            return "".join(map(self._detokenizer.add, tokens))
        pieces = []
        for token in tokens:
            self._attempts.add((token,))
            piece = self._detokenizer.add(token)
            if self.completion_tokens > self.request.min_tokens:
                piece = self._matcher.feed(piece)
            pieces.append(piece)
            if self._matcher.is_stopped:
                self.finish_reason = generation_pb2.FINISH_REASON_STOP
                self.close()
                break
        return "".join(pieces)

    def _on_first_tokens(self, inbox: Inbox, now: float) -> None:
        name = self.request.model.name
        self._metrics.ttft_seconds.labels(name).observe(now - self.request.accepted_at)
        self._metrics.prompt_tokens.labels(name).inc(self.prompt_tokens)
        is_transferred = inbox.start is not None and inbox.start.transferred_tokens > 0
        if inbox.routed is not None:
            self.decode_worker = inbox.routed.decode_worker.name
            if is_transferred:
                self.prefill_worker = inbox.routed.prefill_worker.name
                self.cached_tokens = inbox.routed.prefill_cached_tokens
        if inbox.start is not None and not is_transferred:
            self.cached_tokens = inbox.start.cached_tokens
        self._metrics.cached_tokens.labels(name).inc(self.cached_tokens)


@contextmanager
def running(completion: Completion, metrics: FrontendMetrics) -> Iterator[Completion]:
    """Stops the completion, and counts it, when the body is left for whatever reason."""
    try:
        yield completion
    finally:
        completion.close()
        name = completion.request.model.name
        metrics.completion_tokens.labels(name).inc(completion.completion_tokens)
        if completion.is_finished:
            seconds = asyncio.get_running_loop().time() - completion.request.accepted_at
            metrics.request_seconds.labels(name).observe(seconds)
