"""The simulated engine on an event loop: steps take the time that the timing model says."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress

from libs.common import logs, tracing
from libs.common.errors import TransferFailed
from libs.engine.interface import (
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineSink,
    PoolingTask,
    RequestKey,
    TransferCounters,
)
from libs.engine.sim import transfer
from libs.engine.sim.core.scheduler import TRANSFER_BACKEND, Pull, Scheduler
from libs.engine.sim.settings import SimSettings
from libs.engine.sim.transfer import TransferServer

log = logs.get(__name__)


class SimEngine(Engine):
    """An Engine without a model. Any number of them can share an event loop."""

    def __init__(self, settings: SimSettings) -> None:
        self._settings = settings
        self._scheduler = Scheduler(
            settings.limits,
            settings.timing_model,
            settings.token_source,
            # Unlike any earlier engine's that listened on the same port.
            engine_id=secrets.token_hex(8),
        )
        self._server = TransferServer(
            self,
            block_bytes=settings.block_bytes,
            timeout_seconds=settings.transfer_timeout_seconds,
        )
        self._wake = asyncio.Event()
        self._steps: asyncio.Task[None] | None = None
        self._pulls: dict[RequestKey, asyncio.Task[None]] = {}
        self._transferred_bytes = 0
        self._transferred_blocks = 0

    async def start(self, sink: EngineSink) -> EngineInfo:
        settings = self._settings
        endpoint = await self._server.start(settings.transfer_host, settings.transfer_port)
        self._scheduler.endpoints = (endpoint,)
        self._steps = asyncio.create_task(self._run(sink), name="simulated engine")
        limits = self._scheduler.limits
        return EngineInfo(
            block_size_tokens=limits.block_size_tokens,
            total_kv_blocks=limits.total_kv_blocks,
            context_length_tokens=limits.context_length_tokens,
            max_running_requests=limits.max_running_requests,
            transfer_backend=TRANSFER_BACKEND,
            publishes_kv_events=True,
            pooling_tasks=(PoolingTask.EMBED,) if limits.embedding_dimensions else (),
            has_host_tier=limits.host_kv_blocks > 0,
        )

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        now = asyncio.get_running_loop().time()
        for request in requests:
            self._scheduler.submit(request, now)
        self._wake.set()

    def cancel(self, keys: Sequence[RequestKey]) -> None:
        for key in keys:
            self._scheduler.cancel(key)
            if pull := self._pulls.get(key):
                pull.cancel()
        self._wake.set()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def counters(self) -> TransferCounters:
        return TransferCounters(
            transferred_bytes=self._transferred_bytes,
            transferred_blocks=self._transferred_blocks,
            transfer_failures=self._scheduler.transfer_failures,
            loaded_host_blocks=self._scheduler.loaded_host_blocks,
        )

    async def close(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait({self._steps})
            self._steps = None
        await self._server.close()

    # For other engines, by way of the transfer server

    def offer(self, session_id: str, last_sequence_hash: int) -> int:
        return self._scheduler.offer(
            session_id,
            last_sequence_hash,
            now=asyncio.get_running_loop().time(),
            hold_seconds=self._settings.transfer_timeout_seconds,
        )

    def release(self, session_id: str) -> None:
        self._scheduler.release(session_id, now=asyncio.get_running_loop().time())
        self._wake.set()

    # The loop

    async def _run(self, sink: EngineSink) -> None:
        try:
            async with asyncio.TaskGroup() as pulls:
                await self._step_for_ever(sink, pulls)
        except Exception as error:
            sink.failed(error)

    async def _step_for_ever(self, sink: EngineSink, pulls: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        scheduler = self._scheduler
        step_end = loop.time()
        while True:
            step_seconds = scheduler.begin_step(loop.time())
            for pull in scheduler.take_pulls():
                self._start_pull(pull, pulls)
            self._report_events(sink)
            if step_seconds is None:
                sink.load_changed()
                await self._idle()
                step_end = loop.time()
                continue
            # Steps follow one another without a gap, so that waking up late costs no time; a loop
            # too busy to keep up falls behind instead of making up for it in a burst.
            step_end = max(step_end + step_seconds, loop.time())
            await asyncio.sleep(step_end - loop.time())
            step = scheduler.end_step(loop.time())
            self._report_events(sink)
            sink.step(step)

    async def _idle(self) -> None:
        """Waits until there may be work: something was asked for, arrived, or its time has come."""
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._scheduler.next_expiry):
                await self._wake.wait()

    def _report_events(self, sink: EngineSink) -> None:
        if events := self._scheduler.take_events():
            sink.kv_events(events)

    def _start_pull(self, pull: Pull, pulls: asyncio.TaskGroup) -> None:
        task = self._pulls[pull.key] = pulls.create_task(self._pull(pull))
        # Not in the task itself, which may be cancelled before it has begun.
        task.add_done_callback(lambda _: self._pulls.pop(pull.key))

    async def _pull(self, pull: Pull) -> None:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        try:
            pulled_bytes = await transfer.pull(
                pull,
                bytes_per_second=self._settings.transfer_bytes_per_second,
                timeout_seconds=self._settings.transfer_timeout_seconds,
            )
        except TransferFailed as error:
            log.warning(
                "kv pull failed, computing the prompt here",
                **tracing.log_ids(pull.request_id, pull.traceparent),
                reason=error.message,
            )
            self._scheduler.pull_failed(pull.key, loop.time() - began_at)
        else:
            self._transferred_bytes += pulled_bytes
            self._transferred_blocks += pull.missing_blocks
            self._scheduler.pulled(pull.key, loop.time() - began_at)
        self._wake.set()
