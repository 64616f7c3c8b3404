"""One request on its way: tokens in, text out, and over to another worker when one is lost."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from libs.common import tracing
from libs.common.errors import InternalError, SwitchgearError
from libs.common.hashing import sequence_hashes
from services.frontend.access import Reservation
from services.frontend.core.attempt import Attempts, MigrationPolicy
from services.frontend.core.logprobs import LogprobLedger, Position, TokenLogprobs, of_prompt
from services.frontend.core.stop_strings import StopMatcher
from services.frontend.metrics import FrontendMetrics
from services.frontend.models import ServedModel
from services.frontend.recovery import recovered
from services.frontend.request_trace import RequestTrace
from services.frontend.router_session import Inbox, RouterSessions
from switchgear.common.v1 import generation_pb2, routing_pb2
from switchgear.router.v1 import router_pb2

LONG_PROMPT_TOKENS = 16_384
"""Hashing and serialising more than this takes milliseconds, which belong in a thread."""


class TextRequest(msgspec.Struct, frozen=True, kw_only=True):
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
    includes_stop: bool = False
    """Whether the text ends with the stop string, or the stop token's text, that ended it."""
    keeps_special_tokens: bool = False
    marks: Sequence[str] = ()
    """Special tokens that have a text."""
    sampling: generation_pb2.SamplingOptions = msgspec.field(
        default_factory=generation_pb2.SamplingOptions
    )
    logprobs: generation_pb2.LogprobOptions | None = None
    cache_salt: str = ""
    """Cached blocks are shared with requests of the same salt only."""
    priority: int = 0
    reservation: Reservation | None = None
    """Tokens taken from the caller's limit until it is known how many the request used."""
    traceparent: str = ""
    """The request's own when it is traced, else the caller's; empty when there is none."""
    trace: RequestTrace | None = None
    """Of a request that is sampled."""
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
        self._prompt_logprobs: list[Position] = []
        self._sessions = sessions
        self._metrics = metrics
        self._model_metrics = metrics.of(request.model.name)
        self._attempts = Attempts(
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            policy=policy,
        )
        self._detokenizer = request.model.tokenizer.detokenizer(
            request.prompt, keeps_special_tokens=request.keeps_special_tokens, marks=request.marks
        )
        self._matcher = (
            StopMatcher(request.stop_strings, keeps_stop=request.includes_stop)
            if request.stop_strings
            else None
        )
        asked = request.logprobs
        self._ledger = (
            LogprobLedger() if asked is not None and asked.HasField("output_alternatives") else None
        )
        self._inbox: Inbox | None = None
        self._failure: SwitchgearError | None = None
        self._loop = asyncio.get_running_loop()
        self._last_tokens_at = 0.0
        self._itl = self._model_metrics.itl_seconds

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

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty when none did."""
        return self._matcher.stop_string if self._matcher is not None else ""

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
                if (trace := self.request.trace) is not None:
                    trace.attempt_ended(inbox, error=inbox.error.reason if inbox.error else "")
                if inbox.error is None or self._attempts.remaining_tokens <= 0:
                    # With an error only the news of the end was lost.
                    self.finish_reason = inbox.finish_reason or generation_pb2.FINISH_REASON_LENGTH
                    held = self._matcher.flush() if self._matcher else ""
                    if self._ledger is not None:
                        self._ledger.read(held)
                    return text + held
                await self._recover(inbox.error, inbox.failed_instance_id)
            if tokens:
                return text

    def take_logprobs(self) -> list[TokenLogprobs]:
        """Of the tokens of the text that has been read, less those that were taken before."""
        if self._ledger is None:
            return []
        is_cut_off = self._matcher is not None and self._matcher.is_stopped
        return self._ledger.take(rest=self.is_finished and not is_cut_off)

    def prompt_logprobs(self, pieces: Sequence[str] = ()) -> list[TokenLogprobs]:
        """Of the prompt's tokens, if asked for, once the first text has been read. `pieces` are the
        tokens' texts, without which nothing is known of where they begin."""
        asked = self.request.logprobs
        if asked is None or not asked.HasField("prompt_alternatives"):
            return []
        prompt, positions = self.request.prompt, self._prompt_logprobs
        if len(positions) != len(prompt) - 1:
            raise InternalError("the worker sent no log probabilities of the prompt")
        return of_prompt(prompt, positions, pieces or [""] * len(prompt))

    def close(self) -> None:
        """Gives up what is not finished; the engine stops. May be called twice."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    async def _recover(self, error: SwitchgearError, failed_instance_id: int) -> None:
        if not await recovered(
            self._attempts,
            error,
            failed_instance_id,
            self._metrics.migrations.labels(self.request.model.name, error.reason),
            tracing.log_ids(self.request.request_id, self.request.traceparent),
        ):
            self._failure = error

    async def _submit(self) -> Inbox:
        trace = self.request.trace
        traceparent = self.request.traceparent if trace is None else trace.attempt_begins()
        if len(self.request.prompt) > LONG_PROMPT_TOKENS:
            routing, generation = await asyncio.to_thread(self._commands, traceparent)
        else:
            routing, generation = self._commands(traceparent)
        return await self._sessions.submit_in_time(
            routing,
            generation,
            deadline=self.request.deadline,
            patience_seconds=self._attempts.policy.patience_seconds,
        )

    def _commands(self, traceparent: str) -> tuple[router_pb2.RoutingRequest, bytes]:
        request, attempts = self.request, self._attempts
        facts = request.model.facts
        token_ids = attempts.token_ids
        logprobs = self._logprobs_to_ask_for()
        keeps_prompt_local = logprobs is not None and logprobs.HasField("prompt_alternatives")
        # What is cached is of no use where every prompt token must be computed.
        hashes = (
            []
            if keeps_prompt_local
            else sequence_hashes(
                token_ids, facts.kv_block_size_tokens, cache_salt=request.cache_salt
            )
        )
        routing = router_pb2.RoutingRequest(
            request_id=request.request_id,
            model=facts.name,
            prompt_tokens=len(token_ids),
            block_size_tokens=facts.kv_block_size_tokens,
            sequence_hashes=hashes,
            excluded_instance_ids=attempts.excluded_instance_ids,
            options=request.routing,
            keeps_prompt_local=keeps_prompt_local,
            traceparent=traceparent,
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
            kv=generation_pb2.KvOptions(cache_salt=request.cache_salt),
            logprobs=logprobs,
            priority=request.priority,
            produced_tokens=len(attempts.produced),
            traceparent=traceparent,
        )
        return routing, generation.SerializeToString()

    def _logprobs_to_ask_for(self) -> generation_pb2.LogprobOptions | None:
        """Those of the prompt have come with the first tokens."""
        asked = self.request.logprobs
        if asked is None or not self._attempts.produced:
            return asked
        rest = generation_pb2.LogprobOptions()
        rest.CopyFrom(asked)
        rest.ClearField("prompt_alternatives")
        return rest

    def _absorb(self, inbox: Inbox, tokens: list[int]) -> str:
        now = self._loop.time()
        if not self._last_tokens_at:
            self._on_first_tokens(inbox, now)
        else:
            self._itl.observe((now - self._last_tokens_at) / len(tokens))
        self._last_tokens_at = now
        # The last token of an output that stopped is what stopped it.
        hides_last = (
            inbox.finish_reason == generation_pb2.FINISH_REASON_STOP
            and not self.request.includes_stop
        )
        shown = tokens[:-1] if hides_last else tokens
        if self._matcher is None and self._ledger is None:
            self._attempts.add(shown)
            text = self._detokenizer.add(shown)
        else:
            text = self._text(shown, inbox.take_logprobs())
        if hides_last and not self.is_finished:
            self._attempts.add(tokens[-1:])
        return text

    def _text(self, tokens: list[int], positions: list[Position]) -> str:
        if self._ledger is not None and len(positions) < len(tokens):
            raise InternalError("the worker sent no log probabilities")
        pieces = []
        for index, token in enumerate(tokens):
            self._attempts.add((token,))
            piece = self._detokenizer.add((token,))
            if self._ledger is not None:
                self._ledger.add(positions[index], piece)
            if self._matcher is not None and self.completion_tokens > self.request.min_tokens:
                piece = self._matcher.feed(piece)
            pieces.append(piece)
            if self._matcher is not None and self._matcher.is_stopped:
                self.finish_reason = generation_pb2.FINISH_REASON_STOP
                self.close()
                break
        text = "".join(pieces)
        if self._ledger is not None:
            self._ledger.read(text)
        return text

    def _on_first_tokens(self, inbox: Inbox, now: float) -> None:
        if (trace := self.request.trace) is not None:
            trace.first_tokens()
        self._model_metrics.ttft_seconds.observe(now - self.request.accepted_at)
        self._model_metrics.prompt_tokens.inc(self.prompt_tokens)
        is_transferred = inbox.start is not None and inbox.start.transferred_tokens > 0
        if inbox.routed is not None:
            self.decode_worker = inbox.routed.decode_worker.name
            if is_transferred:
                self.prefill_worker = inbox.routed.prefill_worker.name
                self.cached_tokens = inbox.routed.prefill_cached_tokens
        self._prompt_logprobs = inbox.prompt_logprobs
        if inbox.start is not None and not is_transferred:
            self.cached_tokens = inbox.start.cached_tokens
        self._model_metrics.cached_tokens.inc(self.cached_tokens)


@contextmanager
def running(completion: Completion, metrics: FrontendMetrics) -> Iterator[Completion]:
    """Stops the completion, and counts it, when the body is left for whatever reason."""
    is_unserved = False
    try:
        yield completion
    except SwitchgearError:
        is_unserved = not completion.completion_tokens
        raise
    finally:
        completion.close()
        if (trace := completion.request.trace) is not None:
            trace.end(completion, sys.exception())
        if (reservation := completion.request.reservation) is not None:
            used_tokens = completion.prompt_tokens + completion.completion_tokens
            reservation.settle(0 if is_unserved else used_tokens)
        of_model = metrics.of(completion.request.model.name)
        of_model.completion_tokens.inc(completion.completion_tokens)
        if completion.is_finished:
            seconds = asyncio.get_running_loop().time() - completion.request.accepted_at
            of_model.request_seconds.observe(seconds)
