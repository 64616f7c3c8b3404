"""Runs a scheduler on a virtual clock, and says naively what it should produce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from libs.common import hashing
from libs.common.kv_events import Tier
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineCacheCleared,
    EngineHash,
    EngineKvEvent,
    EngineRequest,
    Finish,
    KvSession,
    Leg,
    Logprobs,
    Prefilled,
    RequestKey,
    Sampling,
    Start,
    Step,
)
from libs.engine.sim.core import tokens as token_states
from libs.engine.sim.core.scheduler import Scheduler, SchedulerLimits
from libs.engine.sim.core.timing import StepWork
from libs.engine.sim.core.tokens import TokenSource

BLOCK_SIZE_TOKENS = 4
LEASE_SECONDS = 30.0
SOURCE = TokenSource(range(1_000, 5_000))


def limits(**changes: Any) -> SchedulerLimits:
    values: dict[str, Any] = {
        "block_size_tokens": BLOCK_SIZE_TOKENS,
        "total_kv_blocks": 1_000,
        "context_length_tokens": 4_000,
        "max_running_requests": 16,
        "chunk_tokens": 64,
        "kv_lease_seconds": LEASE_SECONDS,
    }
    return SchedulerLimits(**values | changes)


def scheduler(source: TokenSource = SOURCE, **changes: Any) -> Scheduler:
    """One whose steps take a second each."""
    return Scheduler(
        limits(**changes), lambda _: 1.0, source, engine_id="sim", endpoints=("peer:1",)
    )


def request(
    key: int,
    prompt: Sequence[int],
    *,
    max_tokens: int = 1,
    leg: Leg = Leg.WHOLE,
    seed: int | None = None,
    cache_salt: str = "",
    kv_session: KvSession | None = None,
    block_size_tokens: int = BLOCK_SIZE_TOKENS,
    **others: Any,
) -> EngineRequest:
    hashes = hashing.sequence_hashes(prompt, block_size_tokens, cache_salt=cache_salt)
    return EngineRequest(
        key=RequestKey(key),
        request_id=f"request-{key}",
        prompt=prompt,
        last_sequence_hash=hashes[-1] if hashes else 0,
        leg=leg,
        max_tokens=max_tokens,
        sampling=Sampling(
            seed=seed,
            logit_bias=others.pop("logit_bias", {}),
            constraint=others.pop("constraint", None),
        ),
        cache_salt=cache_salt,
        kv_session=kv_session,
        **others,
    )


@dataclass
class Outcome:
    """All that an engine has reported, by request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    starts: dict[int, Start] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)
    prefilled: dict[int, Prefilled] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        for start in step.starts:
            assert start.key not in self.starts
            self.starts[start.key] = start
        assert step.counts == [1] * len(step.keys)
        for key, token in zip(step.keys, step.tokens, strict=True):
            assert key in self.starts
            assert key not in self.finishes
            self.tokens.setdefault(key, []).append(token)
        for found in step.logprobs:
            assert found.token_ids[0] == self.tokens[found.key][-1]
            self.logprobs.setdefault(found.key, []).append(found)
        for found in step.prompt_logprobs:
            assert found.key in {start.key for start in step.starts}
            self.prompt_logprobs[found.key] = found
        for finish in step.finishes:
            assert finish.key not in self.finishes
            self.finishes[finish.key] = finish
        for prefilled in step.prefilled:
            assert prefilled.key not in self.prefilled
            self.prefilled[prefilled.key] = prefilled


@dataclass
class Drive:
    """A scheduler and the time."""

    scheduler: Scheduler
    now: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)
    events: list[EngineKvEvent] = field(default_factory=list)

    def submit(self, *requests: EngineRequest) -> None:
        for each in requests:
            self.scheduler.submit(each, self.now)

    def step(self, between: Callable[[], object] = lambda: None) -> bool:
        """False when there was nothing to do."""
        seconds = self.scheduler.begin_step(self.now)
        between()
        if seconds is not None:
            self.now += seconds
            self.outcome.add(self.scheduler.end_step(self.now))
        self.events += self.scheduler.take_events()
        self.scheduler.check_invariants()
        return seconds is not None

    def run(self) -> Outcome:
        """Until there is nothing to do."""
        for _ in range(10_000):
            if not self.step():
                return self.outcome
        raise AssertionError("never idle")


def run(*requests: EngineRequest, source: TokenSource = SOURCE, **changes: Any) -> Outcome:
    """What a fresh engine does with the requests."""
    drive = Drive(scheduler(source, **changes))
    drive.submit(*requests)
    return drive.run()


def expected_tokens(
    asked: EngineRequest, count: int, block_size_tokens: int = BLOCK_SIZE_TOKENS
) -> list[int]:
    """The output by definition: each token from all tokens before it, computed from scratch."""
    tokens = list(asked.prompt)
    for _ in range(count):
        hashes = hashing.sequence_hashes(tokens, block_size_tokens, cache_salt=asked.cache_salt)
        tail = tokens[len(hashes) * block_size_tokens :]
        state = reduce(token_states.fold, tail, hashes[-1] if hashes else 0)
        tokens.append(SOURCE.draw(state ^ token_states.seed_state(asked.sampling.seed)))
    return tokens[len(asked.prompt) :]


class Replay:
    """The set of cached blocks as a reader of the events sees it."""

    def __init__(self) -> None:
        self.parents: dict[EngineHash, EngineHash | None] = {}
        self.in_host: set[EngineHash] = set()

    def apply(self, events: Sequence[EngineKvEvent]) -> None:
        for event in events:
            match event:
                case EngineBlocksStored(tier=Tier.HOST):
                    assert set(event.engine_hashes) <= self.parents.keys()
                    self.in_host.update(event.engine_hashes)
                case EngineBlocksRemoved(tier=Tier.HOST):
                    assert set(event.engine_hashes) <= self.in_host
                    self.in_host.difference_update(event.engine_hashes)
                case EngineBlocksStored():
                    parent = event.parent
                    assert len(event.token_ids) == len(event.engine_hashes) * BLOCK_SIZE_TOKENS
                    for block in event.engine_hashes:
                        assert block not in self.parents
                        assert parent is None or parent in self.parents
                        self.parents[block] = parent
                        parent = block
                case EngineBlocksRemoved():
                    for block in event.engine_hashes:
                        del self.parents[block]
                    assert not set(event.engine_hashes) & set(self.parents.values())
                case EngineCacheCleared():
                    self.parents.clear()
                    self.in_host.clear()


def noting(works: list[StepWork]) -> Callable[[StepWork], float]:
    """A timing model that notes what it is asked for."""

    def step_seconds(work: StepWork) -> float:
        works.append(work)
        return 1.0

    return step_seconds
