"""vLLM as an engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

from libs.common import logs, tracing
from libs.common.errors import InternalError, InvalidRequest, TransferFailed
from libs.engine.interface import (
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineSink,
    Finish,
    FinishReason,
    Leg,
    LogprobOptions,
    Pooled,
    Prefilled,
    RequestKey,
    Start,
    Step,
    TransferCounters,
)
from libs.engine.vllm_engine import requests
from libs.engine.vllm_engine.port import OverduePull, Vllm
from libs.engine.vllm_engine.settings import VllmSettings

log = logs.get(__name__)

OVERDUE_POLL_SECONDS = 0.5
CALL_SECONDS = 30.0
"""Calls to the engine core wait for the step that it is at."""

_FINISH_REASONS = {
    "STOP": FinishReason.STOP,
    "REPETITION": FinishReason.STOP,
    "LENGTH": FinishReason.LENGTH,
    "ABORT": FinishReason.CANCELLED,
    "ERROR": FinishReason.ERROR,
}


@dataclass(slots=True)
class _Running:
    """A request that has not ended."""

    request: EngineRequest
    submitted_at_seconds: float
    pull: dict[str, Any] | None
    """vLLM's parameters for pulling the prompt's KV; None computes it here."""
    queued_tokens: int = 0
    """Prompt tokens to be computed here, until they are. What the cache will save is known only
    then."""
    has_started: bool = False
    is_resubmitted: bool = False
    """Whether its pull was given up and the prompt is computed here after all."""

    @property
    def vllm_id(self) -> str:
        """The id that vLLM is given; another one for another try."""
        return f"{self.request.key}.{int(self.is_resubmitted)}"


@dataclass(frozen=True, slots=True)
class _Kept:
    """KV of a computed prompt, waiting to be pulled."""

    vllm_request_id: str
    until_seconds: float


_Command = Callable[[Vllm], Coroutine[Any, Any, None]]

Load = Callable[[VllmSettings], Awaitable[Vllm]]


async def _load(settings: VllmSettings) -> Vllm:
    from libs.engine.vllm_engine import launch

    return await launch.load(settings)


class VllmEngine(Engine):
    """One vLLM engine, whose engine core is a process of its own.

    Each engine step of vLLM becomes one Step. Submissions, aborts and releases go to vLLM through
    one task, in their order; their queue is as long as what the worker lets in.
    """

    def __init__(self, settings: VllmSettings, load: Load = _load) -> None:
        self._settings = settings
        self._load = load
        self._vllm: Vllm | None = None
        self._tasks: asyncio.Task[None] | None = None
        self._running: dict[RequestKey, _Running] = {}
        self._by_vllm_id: dict[str, _Running] = {}
        self._kept: dict[RequestKey, _Kept] = {}
        """In order of their leases' ends."""
        self._stalled: dict[str, set[str]] = {}
        """Peers, by vLLM's id of their engines, that have stopped answering, with the ids of the
        pulls from them that still have not ended."""
        self._queued_prefill_tokens = 0
        self._transferred_blocks = 0
        self._transfer_failures = 0
        self._loaded_host_blocks = 0
        self._commands: deque[_Command] = deque()
        self._has_commands = asyncio.Event()

    async def start(self, sink: EngineSink) -> EngineInfo:
        self._sink = sink
        self._vllm = await self._load(self._settings)
        self._info = self._vllm.info
        self._stats = self._vllm.stats
        self._stats.on_change = sink.load_changed
        self._tasks = asyncio.create_task(self._run(self._vllm), name="vllm engine")
        return self._info

    def submit(self, new: Sequence[EngineRequest]) -> None:
        now = time.monotonic()
        for request in new:
            running = _Running(request, now, self._pull_of(request, now))
            if running.pull is None:
                self._queue_prompt(running)
            self._running[request.key] = running
            self._send(running)

    def cancel(self, keys: Sequence[RequestKey]) -> None:
        aborted: list[str] = []
        for key in keys:
            if (running := self._running.get(key)) is not None:
                self._forget(running)
                aborted.append(running.vllm_id)
            elif (kept := self._kept.pop(key, None)) is not None:
                self._command(methodcaller("release", kept.vllm_request_id))
        if aborted:
            self._command(methodcaller("abort", aborted))

    def load(self) -> EngineLoad:
        stats = self._stats
        running = min(stats.running_requests, len(self._running))
        return EngineLoad(
            running_requests=running,
            waiting_requests=len(self._running) - running,
            queued_prefill_tokens=self._queued_prefill_tokens,
            active_kv_blocks=round(stats.kv_cache_usage * self._info.total_kv_blocks),
            total_kv_blocks=self._info.total_kv_blocks,
        )

    def counters(self) -> TransferCounters:
        return TransferCounters(
            transferred_bytes=self._stats.transferred_bytes,
            transferred_blocks=self._transferred_blocks,
            transfer_failures=self._transfer_failures,
            loaded_host_blocks=self._loaded_host_blocks,
        )

    async def close(self) -> None:
        vllm, self._vllm = self._vllm, None
        if self._tasks is not None:
            self._tasks.cancel()
            await asyncio.wait({self._tasks})
        if vllm is not None:
            await vllm.close()

    # Requests on their way to vLLM.

    def _pull_of(self, request: EngineRequest, now: float) -> dict[str, Any] | None:
        if request.leg is not Leg.DECODE or request.kv_session is None:
            return None
        if request.logprobs is not None and request.logprobs.prompt_alternatives is not None:
            return None  # What is pulled tells nothing of the prompt's own probabilities.
        try:
            pull = requests.pull_params(request, request.kv_session, now)
            if (peer := pull["remote_engine_id"]) in self._stalled:
                raise TransferFailed(f"earlier pulls from engine {peer} are stuck")
        except TransferFailed as error:
            log.warning(
                "kv not pulled",
                **tracing.log_ids(request.request_id, request.traceparent),
                reason=error.message,
            )
            return None
        return pull

    def _queue_prompt(self, running: _Running) -> None:
        running.queued_tokens = len(running.request.prompt)
        self._queued_prefill_tokens += running.queued_tokens

    def _dequeue_prompt(self, running: _Running) -> None:
        self._queued_prefill_tokens -= running.queued_tokens
        running.queued_tokens = 0

    def _forget(self, running: _Running) -> None:
        self._dequeue_prompt(running)
        del self._running[running.request.key]
        del self._by_vllm_id[running.vllm_id]

    def _send(self, running: _Running) -> None:
        vllm_id = running.vllm_id
        self._by_vllm_id[vllm_id] = running
        self._command(partial(self._add, running=running, vllm_id=vllm_id))

    def _command(self, command: _Command) -> None:
        self._commands.append(command)
        self._has_commands.set()

    async def _run_commands(self, vllm: Vllm) -> None:
        while True:
            await self._has_commands.wait()
            self._has_commands.clear()
            while self._commands:
                await self._commands.popleft()(vllm)

    async def _add(self, vllm: Vllm, running: _Running, vllm_id: str) -> None:
        if self._by_vllm_id.get(vllm_id) is not running:
            return  # Cancelled before its turn.
        request = running.request
        if request.pooling is not None:
            arguments = requests.pooling_arguments(request.pooling)
        elif request.leg is Leg.PREFILL:
            arguments = requests.prefill_arguments()
        else:
            arguments = requests.sampling_arguments(request, running.pull)
        try:
            await vllm.add(vllm_id, request, arguments)
        except InvalidRequest as error:
            if self._by_vllm_id.get(vllm_id) is running:
                self._forget(running)
                self._sink.step(Step(finishes=[Finish(request.key, FinishReason.ERROR, error)]))

    # What vLLM reports.

    def _on_outputs(self, outputs: Sequence[tuple[str, Any]], step_at_seconds: float) -> None:
        step = Step()
        for vllm_id, output in outputs:
            running = self._by_vllm_id.get(vllm_id)
            if running is None:
                continue
            if running.request.pooling is not None:
                self._pooled(step, running, output)
            elif running.request.leg is Leg.PREFILL:
                self._prefilled(step, running, output, step_at_seconds)
            else:
                self._produced(step, running, output)
        self._sink.step(step)

    def _produced(self, step: Step, running: _Running, output: Any) -> None:
        key = running.request.key
        if output.new_token_ids:
            if not running.has_started:
                step.starts.append(self._start(running, output))
            step.keys.append(key)
            step.counts.append(len(output.new_token_ids))
            step.tokens.extend(output.new_token_ids)
            if (asked := running.request.logprobs) is not None:
                self._find_logprobs(step, key, asked, output)
        if output.finish_reason is not None:
            self._forget(running)
            step.finishes.append(_finish(key, output))

    def _pooled(self, step: Step, running: _Running, output: Any) -> None:
        if output.finish_reason is None:
            return
        key = running.request.key
        if output.pooling_output is not None:
            step.starts.append(self._start(running, output))
            step.pooled.append(Pooled(key, requests.pooled_values(output.pooling_output)))
        self._forget(running)
        step.finishes.append(_finish(key, output))

    @staticmethod
    def _find_logprobs(step: Step, key: RequestKey, asked: LogprobOptions, output: Any) -> None:
        if asked.output_alternatives is not None and (columns := output.new_logprobs) is not None:
            step.logprobs.append(requests.logprobs_of(key, columns, asked.output_alternatives))
        columns = output.new_prompt_logprobs_tensors
        if asked.prompt_alternatives is not None and columns is not None:
            step.prompt_logprobs.append(
                requests.logprobs_of(key, columns, asked.prompt_alternatives)
            )

    def _start(self, running: _Running, output: Any) -> Start:
        running.has_started = True
        self._dequeue_prompt(running)
        cached_tokens, transferred_tokens = self._sources(running, output.prefill_stats)
        if transferred_tokens:
            self._transferred_blocks += -(-transferred_tokens // self._info.block_size_tokens)
        elif running.request.kv_session is not None:
            self._transfer_failures += 1
        # vLLM does not tell the pull from the wait for room before it.
        waited_seconds = _waited_seconds(output)
        queue_seconds, transfer_seconds = (
            (0.0, waited_seconds) if transferred_tokens else (waited_seconds, 0.0)
        )
        return Start(
            running.request.key,
            cached_tokens,
            transferred_tokens,
            queue_seconds,
            transfer_seconds,
        )

    def _sources(self, running: _Running, stats: Any) -> tuple[int, int]:
        """Prompt tokens that this engine had, and those that it pulled. What vLLM calls external is
        either of one pull or from the host tier. A pull brings all of the prompt; from the host
        tier comes less, since the last token is always computed."""
        local, external = stats.num_local_cached_tokens, stats.num_external_cached_tokens
        is_all = local + external >= len(running.request.prompt)
        if self._info.has_host_tier and not (running.pull is not None and is_all):
            self._loaded_host_blocks += external // self._info.block_size_tokens
            return local + external, 0
        return local, external

    def _prefilled(
        self, step: Step, running: _Running, output: Any, step_at_seconds: float
    ) -> None:
        if output.finish_reason is None:
            return
        key = running.request.key
        self._forget(running)
        params = output.kv_transfer_params
        if params is None:
            finish = _finish(key, output)
            if finish.reason is not FinishReason.CANCELLED and finish.error is None:
                error = InternalError("this engine keeps no KV for others to pull")
                finish = Finish(key, FinishReason.ERROR, error)
            step.finishes.append(finish)
            return
        now = time.monotonic()
        time_to_live = self._settings.session_seconds - (now - step_at_seconds)
        session = requests.session_of(running.request, params, time_to_live)
        self._keep(key, _Kept(session.session_id, now + self._settings.kv_lease_seconds), now)
        cached_tokens, _ = self._sources(running, output.prefill_stats)
        step.prefilled.append(Prefilled(key, session, cached_tokens, _waited_seconds(output)))

    def _keep(self, key: RequestKey, kept: _Kept, now: float) -> None:
        for old, session in list(self._kept.items()):
            if session.until_seconds > now:
                break
            del self._kept[old]
        self._kept[key] = kept

    # The engine's own tasks.

    async def _run(self, vllm: Vllm) -> None:
        """Runs them until `close`; the first to fail, or the engine's death, is reported."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_life(vllm), name="vllm life")
                group.create_task(self._run_commands(vllm), name="vllm commands")
                group.create_task(self._follow_kv_events(vllm), name="vllm kv events")
                if self._settings.leg is Leg.DECODE:
                    group.create_task(self._watch_pulls(vllm), name="vllm pulls")
        except* Exception as errors:
            self._sink.failed(errors)

    async def _watch_life(self, vllm: Vllm) -> None:
        await asyncio.wait({vllm.run(self._on_outputs)})
        raise InternalError("vLLM's engine core died")

    async def _follow_kv_events(self, vllm: Vllm) -> None:
        async for events in vllm.kv_events():
            self._sink.kv_events(events)

    async def _watch_pulls(self, vllm: Vllm) -> None:
        """Gives up pulls that take too long, and leaves their peers alone until they end."""
        while True:
            await asyncio.sleep(OVERDUE_POLL_SECONDS)
            begun_before = time.monotonic() - self._settings.transfer_timeout_seconds
            if self._stalled or any(
                running.pull is not None
                and not running.has_started
                and running.submitted_at_seconds < begun_before
                for running in self._running.values()
            ):
                try:
                    async with asyncio.timeout(CALL_SECONDS):
                        overdue = await vllm.overdue_pulls()
                except TimeoutError:
                    log.warning("vllm does not answer", seconds=CALL_SECONDS)
                else:
                    self._give_up(overdue)

    def _give_up(self, overdue: Sequence[OverduePull]) -> None:
        for peer, pulls in list(self._stalled.items()):
            pulls.intersection_update(pull.pull_id for pull in overdue)
            if not pulls:
                del self._stalled[peer]
        for pull in overdue:
            running = self._by_vllm_id.get(pull.vllm_id)
            if running is None or running.pull is None:
                continue
            request = running.request
            log.warning(
                "kv pull given up", **tracing.log_ids(request.request_id, request.traceparent)
            )
            self._stalled.setdefault(running.pull["remote_engine_id"], set()).add(pull.pull_id)
            self._compute_anew(running)

    def _compute_anew(self, running: _Running) -> None:
        """Has the prompt computed here, in other blocks than those that are being pulled into."""
        del self._by_vllm_id[running.vllm_id]
        self._command(methodcaller("abort", [running.vllm_id]))
        running.is_resubmitted = True
        running.pull = None
        self._queue_prompt(running)
        self._send(running)
        self._sink.load_changed()


def _waited_seconds(output: Any) -> float:
    """From when vLLM took the request in to when it first ran; 0 when it does not say."""
    at: dict[str, float] = {}
    for event in output.events or ():
        at.setdefault(event.type.name, event.timestamp)
    if "QUEUED" not in at or "SCHEDULED" not in at:
        return 0.0
    return max(0.0, at["SCHEDULED"] - at["QUEUED"])


def _finish(key: RequestKey, output: Any) -> Finish:
    reason = _FINISH_REASONS[output.finish_reason.name]
    if reason is FinishReason.ERROR:
        return Finish(key, reason, InternalError("vLLM failed the request"))
    return Finish(key, reason)
