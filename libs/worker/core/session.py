"""One session's side of a worker: what its client has not been told yet. Pure.

Steps are merged while the client is behind: columns grow, the number of messages does not. Credit
bounds what is on its way, and the columns are bounded by what the live requests may still produce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from libs.common import grpc_errors
from libs.common.credit import Credit
from libs.common.errors import ProtocolViolation, SwitchgearError
from libs.engine.interface import (
    EngineLoad,
    Finish,
    Logprobs,
    Pooled,
    Prefilled,
    RequestKey,
    Start,
)
from libs.worker.core import wire
from switchgear.common.v1 import outputs_pb2
from switchgear.worker.v1 import worker_pb2

MUCH_PREFILL_TOKENS = 512
"""A change of the queue by which another worker may be the better one."""

Handle = int
"""The client's name for a request, unique within its session."""


class Session:
    """The outbox of one client, and which of its requests are live."""

    def __init__(self, wake: Callable[[], None], window_responses: int) -> None:
        """`wake` is called whenever there may be something to take."""
        self._credit = Credit(window_responses)
        self.keys: dict[Handle, RequestKey] = {}
        """Live requests."""
        self.kept: dict[Handle, RequestKey] = {}
        """Prefill legs that are over and whose KV may still wait, for a cancellation that crossed
        their end."""
        self.taken_sequence_number = 0
        self._wake = wake
        self._load_sent: EngineLoad | None = None
        self._clear()

    def _clear(self) -> None:
        self._handles: list[Handle] = []
        self._counts: list[int] = []  # Empty as long as every entry has one token.
        self._tokens: list[int] = []
        self._starts: list[outputs_pb2.SequenceStart] = []
        self._finishes: list[outputs_pb2.SequenceFinish] = []
        self._pooled: list[outputs_pb2.Pooled] = []
        self._prefilled: list[worker_pb2.Prefilled] = []
        self._refusals: list[worker_pb2.Refusal] = []
        self._logprobs: outputs_pb2.Logprobs | None = None
        self._prompt_logprobs: outputs_pb2.Logprobs | None = None
        self._is_dirty = False

    def command(self, sequence_number: int, consumed_responses: int) -> None:
        """Takes note of a request message's header. Raises ProtocolViolation when out of order."""
        if sequence_number != self.taken_sequence_number + 1:
            raise ProtocolViolation(
                f"sequence_number must be {self.taken_sequence_number + 1}, got {sequence_number}"
            )
        self._credit.consumed(consumed_responses)
        self.taken_sequence_number = sequence_number
        if self._is_dirty:
            self._wake()

    def started(self, handle: Handle, start: Start) -> None:
        self._starts.append(
            outputs_pb2.SequenceStart(
                handle=handle,
                cached_tokens=start.cached_tokens,
                transferred_tokens=start.transferred_tokens,
            )
        )

    def produced_one(self, handle: Handle, token: int) -> None:
        """A step's only token for the handle: the usual case, and the hot one."""
        self._handles.append(handle)
        self._tokens.append(token)
        if self._counts:
            self._counts.append(1)

    def produced(self, handle: Handle, tokens: Sequence[int]) -> None:
        if not self._counts:
            self._counts = [1] * len(self._handles)
        self._handles.append(handle)
        self._counts.append(len(tokens))
        self._tokens.extend(tokens)

    def found_logprobs(self, handle: Handle, found: Logprobs) -> None:
        """Of the tokens that the handle got in this step."""
        self._logprobs = _with_logprobs(self._logprobs, handle, found)

    def found_prompt_logprobs(self, handle: Handle, found: Logprobs) -> None:
        """Of the prompt of a request that starts in this step."""
        self._prompt_logprobs = _with_logprobs(self._prompt_logprobs, handle, found)

    def pooled(self, handle: Handle, pooled: Pooled) -> None:
        """What a request gets instead of tokens, before it is finished."""
        self._pooled.append(outputs_pb2.Pooled(handle=handle, values=pooled.values))

    def finished(self, handle: Handle, finish: Finish) -> None:
        """Ends a request; nothing may follow for the handle."""
        del self.keys[handle]
        message = outputs_pb2.SequenceFinish(
            handle=handle, reason=wire.finish_reason(finish.reason)
        )
        if finish.error is not None:
            message.error.CopyFrom(grpc_errors.to_message(finish.error))
        self._finishes.append(message)

    def prefilled(self, handle: Handle, prefilled: Prefilled) -> None:
        """Ends a prefill leg."""
        self.kept[handle] = self.keys.pop(handle)
        self._prefilled.append(
            worker_pb2.Prefilled(
                handle=handle,
                kv_session=wire.kv_session_to_message(prefilled.kv_session),
                cached_tokens=prefilled.cached_tokens,
            )
        )

    def refused(self, handle: Handle, error: SwitchgearError) -> None:
        """The request was not run."""
        self._refusals.append(
            worker_pb2.Refusal(handle=handle, error=grpc_errors.to_message(error))
        )
        self._touch()

    def flush(self) -> None:
        """Called once after a step put something in."""
        self._touch()

    def load_changed(self, load: EngineLoad, *, is_any_told: bool = False) -> bool:
        """Lets an idle client know what others made of the worker. Without `is_any_told` only if it
        matters for whether the worker gets the next request. Returns whether there is nothing left
        to tell."""
        sent = self._load_sent
        if load == sent:
            return True
        if is_any_told or sent is None or _is_much(sent, load):
            self._touch()
            return True
        return False

    def repeat_load(self) -> None:
        """The client may have heard of another load since, on a session of its that has ended."""
        self._load_sent = None

    def _touch(self) -> None:
        self._is_dirty = True
        self._wake()

    def take(self, read_load: Callable[[], EngineLoad]) -> worker_pb2.SessionResponse | None:
        """The next message to send, with everything there is; None when there is nothing, or no
        credit."""
        if not self._is_dirty or self._credit.is_exhausted:
            return None
        load = read_load()
        response = worker_pb2.SessionResponse(
            load=wire.load_to_message(load),
            taken_sequence_number=self.taken_sequence_number,
            prefilled=self._prefilled,
            refusals=self._refusals,
            starts=self._starts,
        )
        if self._handles or self._finishes or self._starts:
            outputs = outputs_pb2.StepOutputs(
                handles=self._handles,
                token_counts=self._counts,
                token_ids=self._tokens,
                starts=self._starts,
                finishes=self._finishes,
                logprobs=self._logprobs,
                prompt_logprobs=self._prompt_logprobs,
                pooled=self._pooled,
            )
            response.outputs = outputs.SerializeToString()
            response.finished_handles.extend(finish.handle for finish in self._finishes)
        self._clear()
        self._credit.sent()
        self._load_sent = load
        return response


def _is_much(before: EngineLoad, now: EngineLoad) -> bool:
    """Whether one or two requests have come or gone; of many, a sixteenth."""
    requests = before.running_requests + before.waiting_requests
    change = abs(now.running_requests + now.waiting_requests - requests)
    if change > requests // 16:
        return True
    if abs(now.queued_prefill_tokens - before.queued_prefill_tokens) >= MUCH_PREFILL_TOKENS:
        return True
    return abs(now.active_kv_blocks - before.active_kv_blocks) > now.total_kv_blocks // 64


def _with_logprobs(
    columns: outputs_pb2.Logprobs | None, handle: Handle, found: Logprobs
) -> outputs_pb2.Logprobs:
    columns = columns or outputs_pb2.Logprobs()
    columns.handles.append(handle)
    columns.position_counts.append(len(found.token_ids) // found.candidates)
    columns.candidate_counts.append(found.candidates)
    columns.token_ids.extend(found.token_ids)
    columns.logprobs.extend(found.logprobs)
    return columns
