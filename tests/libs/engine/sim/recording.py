"""A sink that keeps what an engine reports, and lets tests wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from libs.engine.interface import EngineKvEvent, Step
from tests.libs.engine.sim.core.driving import Outcome

WAIT_SECONDS = 20.0


class RecordingSink:
    def __init__(self) -> None:
        self.outcome = Outcome()
        self.events: list[EngineKvEvent] = []
        self.failure: BaseException | None = None
        self._reported = asyncio.Event()

    def step(self, step: Step) -> None:
        self.outcome.add(step)
        self._reported.set()

    def kv_events(self, events: Sequence[EngineKvEvent]) -> None:
        self.events += events

    def load_changed(self) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        assert self.failure is None
        self.failure = error
        self._reported.set()

    async def until(self, is_reached: Callable[[], object]) -> None:
        """Looks again whenever the engine has reported something."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not is_reached():
                self._reported.clear()
                await self._reported.wait()
