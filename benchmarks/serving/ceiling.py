"""How many tokens the simulated engine makes by itself: `python -m benchmarks.serving.ceiling`.

The same engine as in a worker, but with steps that take no time and nobody around it. What a worker
process streams lies below this whatever its shell does.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence

from libs.engine.interface import EngineKvEvent, EngineRequest, Leg, RequestKey, Step
from libs.engine.sim.engine import SimEngine
from libs.engine.sim.settings import SimSettings

_PROMPT_TOKENS = 70
_OUTPUT_TOKENS = 64
_SECONDS = 2.0


class _Replacing:
    """Counts tokens, and submits a new request for each that finishes."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self._submitted = 0
        self.tokens = 0
        self.failure: BaseException | None = None

    def submit(self, count: int) -> None:
        first = self._submitted
        self._submitted += count
        self._engine.submit([_request(number) for number in range(first, first + count)])

    def step(self, step: Step) -> None:
        self.tokens += len(step.tokens)
        if step.finishes:
            self.submit(len(step.finishes))

    def kv_events(self, events: Sequence[EngineKvEvent]) -> None:
        pass

    def load_changed(self) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        self.failure = error


def _request(number: int) -> EngineRequest:
    return EngineRequest(
        key=RequestKey(number),
        request_id=str(number),
        prompt=[number % 40_000, *range(1, _PROMPT_TOKENS)],
        last_sequence_hash=0,
        leg=Leg.WHOLE,
        max_tokens=_OUTPUT_TOKENS,
        ignore_eos=True,
    )


async def measure(sequences: int) -> float:
    """Tokens per second of CPU time, which is all that a process has."""
    engine = SimEngine(SimSettings(timing="fixed", step_ms=0.0))
    sink = _Replacing(engine)
    await engine.start(sink)
    try:
        sink.submit(sequences)
        await asyncio.sleep(_SECONDS / 10)
        tokens, cpu_seconds = sink.tokens, time.process_time()
        await asyncio.sleep(_SECONDS)
        tokens, cpu_seconds = sink.tokens - tokens, time.process_time() - cpu_seconds
    finally:
        await engine.close()
    if sink.failure is not None:
        raise sink.failure
    return tokens / cpu_seconds


if __name__ == "__main__":
    print(json.dumps({count: asyncio.run(measure(int(count))) for count in sys.argv[1:]}))
