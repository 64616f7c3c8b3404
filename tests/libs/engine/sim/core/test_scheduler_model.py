"""Whatever is asked for in whatever order: nothing leaks or is lost, and outputs are as defined."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.common.errors import TransferFailed
from libs.engine.interface import EngineRequest, FinishReason, KvSession, Leg, RequestKey
from libs.engine.sim.core.pool import engine_hash
from libs.engine.sim.core.scheduler import Pull
from tests.libs.engine.sim.core.driving import (
    BLOCK_SIZE_TOKENS,
    LEASE_SECONDS,
    Drive,
    Replay,
    expected_tokens,
    request,
    scheduler,
)

# Two letters, so that prefixes meet; a pool that holds two or three sequences; chunks that cut.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)
legs = st.sampled_from(Leg)
indexes = st.integers(0, 1_000)


class SchedulerMachine(RuleBasedStateMachine):
    host_kv_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.drive = Drive(
            scheduler(
                total_kv_blocks=12,
                chunk_tokens=10,
                max_running_requests=4,
                context_length_tokens=40,
                host_kv_blocks=self.host_kv_blocks,
                host_load_seconds_per_block=0.7,
            )
        )
        self.replay = Replay()
        self.asked: dict[int, EngineRequest] = {}
        self.cancelled: set[int] = set()
        self.pulls: list[Pull] = []
        self.ever_pulled: set[int] = set()

    @property
    def outcome_keys(self) -> set[int]:
        return set(self.drive.outcome.finishes) | set(self.drive.outcome.prefilled)

    @rule(
        prompt=prompts,
        leg=legs,
        max_tokens=st.integers(1, 30),
        cache_salt=st.sampled_from(["", "tenant"]),
        time_to_live_seconds=st.sampled_from([0.0, 3.0, 1_000.0]),
    )
    def submit(
        self,
        prompt: list[int],
        leg: Leg,
        max_tokens: int,
        cache_salt: str,
        time_to_live_seconds: float,
    ) -> None:
        key = len(self.asked)
        asked = request(key, prompt, leg=leg, max_tokens=max_tokens, cache_salt=cache_salt)
        if leg is Leg.DECODE:
            session = KvSession(
                session_id=f"peer-{key}",
                transfer_backend="sim",
                endpoints=("peer:1",),
                attributes=b"{}",
                time_to_live_seconds=time_to_live_seconds,
                last_sequence_hash=asked.last_sequence_hash,
                tokens=len(prompt),
            )
            asked = request(
                key,
                prompt,
                leg=leg,
                max_tokens=max_tokens,
                cache_salt=cache_salt,
                kv_session=session,
            )
        self.asked[key] = asked
        self.drive.submit(asked)

    @rule()
    def step(self) -> None:
        self.drive.step()

    @precondition(lambda self: self.asked)
    @rule(index=indexes)
    def cancel(self, index: int) -> None:
        self._cancel(index)

    @precondition(lambda self: self.asked)
    @rule(index=indexes)
    def cancel_during_a_step(self, index: int) -> None:
        self.drive.step(between=lambda: self._cancel(index))

    def _cancel(self, index: int) -> None:
        key = index % len(self.asked)
        self.drive.scheduler.cancel(RequestKey(key))
        if key not in self.outcome_keys:
            self.cancelled.add(key)

    @precondition(lambda self: self.pulls)
    @rule(index=indexes, is_good=st.booleans(), during_a_step=st.booleans())
    def end_a_pull(self, index: int, is_good: bool, during_a_step: bool) -> None:
        pull = self.pulls.pop(index % len(self.pulls))
        end = self.drive.scheduler.pulled if is_good else self.drive.scheduler.pull_failed
        if during_a_step:
            self.drive.step(between=lambda: end(pull.key))
        else:
            end(pull.key)

    @precondition(lambda self: self.drive.outcome.prefilled)
    @rule(index=indexes)
    def be_pulled_from(self, index: int) -> None:
        prefilled = list(self.drive.outcome.prefilled.values())
        session = prefilled[index % len(prefilled)].kv_session
        sim = self.drive.scheduler
        before = sim.load().active_kv_blocks
        try:
            blocks = sim.offer(session.session_id, session.last_sequence_hash, self.drive.now, 1.0)
            sim.release(session.session_id, self.drive.now)
        except TransferFailed:
            return
        assert blocks == -(-session.tokens // BLOCK_SIZE_TOKENS)
        assert before - blocks <= sim.load().active_kv_blocks <= before

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.drive.now += seconds

    @invariant()
    def accounts_add_up(self) -> None:
        self.drive.scheduler.check_invariants()
        for pull in self.drive.scheduler.take_pulls():
            assert pull.key not in self.ever_pulled
            self.ever_pulled.add(pull.key)
            self.pulls.append(pull)

    @invariant()
    def events_replay_to_the_cached_set(self) -> None:
        self.replay.apply(self.drive.events + self.drive.scheduler.take_events())
        self.drive.events.clear()
        cached = self.drive.scheduler.pool.holders()
        assert set(self.replay.parents) == set(map(engine_hash, cached))
        host = self.drive.scheduler.host
        assert self.replay.in_host == (set() if host is None else set(host.readers()))

    @invariant()
    def outputs_are_as_defined(self) -> None:
        outcome = self.drive.outcome
        for key, finish in outcome.finishes.items():
            asked = self.asked[key]
            assert asked.leg is not Leg.PREFILL
            assert finish.reason is FinishReason.LENGTH
            tokens = outcome.tokens[key]
            assert len(tokens) == min(asked.max_tokens, 40 - len(asked.prompt))
            assert tokens == expected_tokens(asked, len(tokens))
        for key, start in outcome.starts.items():
            assert start.cached_tokens % BLOCK_SIZE_TOKENS == 0
            assert start.cached_tokens + start.transferred_tokens < len(self.asked[key].prompt)

    def teardown(self) -> None:
        """All that was asked for ends, and then no block is in use."""
        for _ in range(2_000):
            for pull in self.pulls:
                self.drive.scheduler.pulled(pull.key)
            self.pulls = []
            is_busy = self.drive.step()
            self.accounts_add_up()
            if not is_busy and not self.pulls:
                if self.drive.scheduler.next_expiry is None:
                    break
                self.drive.now = max(self.drive.now, self.drive.scheduler.next_expiry)
        self.outputs_are_as_defined()
        assert self.outcome_keys >= set(self.asked) - self.cancelled
        assert not self.outcome_keys & self.cancelled
        load = self.drive.scheduler.load()
        assert (load.running_requests, load.waiting_requests) == (0, 0)
        assert (load.active_kv_blocks, load.queued_prefill_tokens) == (0, 0)


class TieredSchedulerMachine(SchedulerMachine):
    host_kv_blocks = 9


TestTieredScheduler = TieredSchedulerMachine.TestCase
TestTieredScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
