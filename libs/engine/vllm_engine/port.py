"""What the engine asks of a loaded vLLM. The tests have one of their own, without a model."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libs.engine.interface import EngineInfo, EngineKvEvent, EngineRequest

OnOutputs = Callable[[Sequence[tuple[str, Any]], float], None]
"""Takes what one engine step produced: vLLM's EngineCoreOutput, each with the id that we gave its
request, and when the step ended, in CLOCK_MONOTONIC seconds."""


@dataclass(slots=True)
class StepStats:
    """vLLM's state as of its last step."""

    running_requests: int = 0
    kv_cache_usage: float = 0.0
    transferred_bytes: int = 0
    """Since the start."""
    on_change: Callable[[], None] = lambda: None
    """Called on the event loop after each step's have been set, which follow its outputs."""


@dataclass(frozen=True, slots=True)
class OverduePull:
    """A pull that is going on for longer than the transfer timeout."""

    pull_id: str
    """vLLM's own id of the request that began it."""
    vllm_id: str
    """The id that we gave that request; empty when it was aborted since."""


class Vllm(ABC):
    """A loaded vLLM, whose engine core is a process of its own."""

    info: EngineInfo
    stats: StepStats

    @abstractmethod
    def run(self, on_outputs: OnOutputs) -> asyncio.Task[None]:
        """Starts reporting engine steps on the running loop. The task ends when the engine core
        is dead; vLLM owns it."""

    @abstractmethod
    async def add(self, vllm_id: str, request: EngineRequest, arguments: Mapping[str, Any]) -> None:
        """Adds a request: its prompt, with arguments as `requests` has them, those of
        PoolingParams where the request pools its prompt and else those of SamplingParams.

        Raises InvalidRequest for what vLLM does not accept.
        """

    @abstractmethod
    async def abort(self, vllm_ids: Sequence[str]) -> None:
        """Aborts requests; nothing more is reported of them. Unknown ids are ignored."""

    @abstractmethod
    async def release(self, vllm_request_id: str) -> None:
        """Frees the KV kept for a prefilled request, by vLLM's own id, unless it was pulled."""

    @abstractmethod
    async def overdue_pulls(self) -> list[OverduePull]:
        """Pulls that take too long, of aborted requests too. Waits for the current step."""

    @abstractmethod
    def kv_events(self) -> AsyncIterator[list[EngineKvEvent]]:
        """All KV events from the first on, a batch an engine step."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the engine core, within some seconds."""
