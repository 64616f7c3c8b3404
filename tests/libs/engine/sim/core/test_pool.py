"""The pool against one that keeps a list of blocks and looks for the best to evict."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from libs.common import hashing
from libs.engine.interface import EngineBlocksRemoved, EngineBlocksStored
from libs.engine.sim.core.pool import BlockPool, engine_hash
from tests.libs.engine.sim.core.driving import BLOCK_SIZE_TOKENS, Replay

TOTAL_BLOCKS = 12

Chain = tuple[list[int], list[int], int]
"""Tokens, their hashes, and how many of the blocks are published; the others are private."""


class NaivePool:
    def __init__(self) -> None:
        self.private = 0
        self.holders: dict[int, int] = {}
        self.idle_since: dict[int, int] = {}
        self.time = 0

    def acquire(self, cached: list[int], private: int) -> bool:
        idle = [block for block, n in self.holders.items() if not n and block not in cached]
        if private > TOTAL_BLOCKS - self.private - len(self.holders) + len(idle):
            return False
        for block in cached:
            self.holders[block] += 1
        self.private += private
        while self.private + len(self.holders) > TOTAL_BLOCKS:
            idle = [block for block, n in self.holders.items() if not n]
            del self.holders[min(idle, key=self.idle_since.__getitem__)]
        return True

    def publish(self, hashes: list[int]) -> None:
        for block in hashes:
            self.private -= 1
            self.holders[block] = self.holders.get(block, 0) + 1

    def release(self, held: list[int], private: int) -> None:
        self.private -= private
        for block in reversed(held):
            self.holders[block] -= 1
            self.time += 1
            self.idle_since[block] = self.time


class PoolMachine(RuleBasedStateMachine):
    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL_BLOCKS, BLOCK_SIZE_TOKENS)
        self.naive = NaivePool()
        self.replay = Replay()

    # Few letters and short prompts, so that prefixes meet.
    @rule(target=chains, letters=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def acquire(self, letters: list[int]) -> object:
        tokens = [letter for letter in letters for _ in range(BLOCK_SIZE_TOKENS)]
        hashes = hashing.sequence_hashes(tokens, BLOCK_SIZE_TOKENS)
        cached = self.pool.cached_prefix(hashes, len(hashes))
        private = len(hashes) - cached
        is_taken = self.pool.acquire(hashes[:cached], private)
        assert is_taken == self.naive.acquire(hashes[:cached], private)
        return (tokens, hashes, cached) if is_taken else multiple()

    @rule(target=chains, chain=consumes(chains), blocks=st.integers(1, 5))
    def publish(self, chain: Chain, blocks: int) -> Chain:
        tokens, hashes, published = chain
        end = min(len(hashes), published + blocks)
        self.pool.publish(hashes, published, end, tokens, "")
        self.naive.publish(hashes[published:end])
        return tokens, hashes, end

    @rule(chain=consumes(chains))
    def release(self, chain: Chain) -> None:
        _, hashes, published = chain
        self.pool.release(hashes[:published], len(hashes) - published)
        self.naive.release(hashes[:published], len(hashes) - published)

    @invariant()
    def agrees_with_the_naive_pool(self) -> None:
        self.pool.check_invariants()
        assert self.pool.holders() == self.naive.holders
        assert self.pool.private_blocks == self.naive.private
        assert self.pool.active_blocks == self.naive.private + sum(
            1 for n in self.naive.holders.values() if n
        )

    # Not after every change, so that events of several changes come together.
    @rule()
    def events_replay_to_the_cached_set(self) -> None:
        self.replay.apply(self.pool.take_events())
        assert set(self.replay.parents) == set(map(engine_hash, self.pool.holders()))

    def teardown(self) -> None:
        self.events_replay_to_the_cached_set()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_last_block_of_the_longest_unused_prompt_is_evicted_first() -> None:
    pool = BlockPool(4, 1)
    for start in (10, 20):
        hashes = [start, start + 1]
        assert pool.acquire((), 2)
        pool.publish(hashes, 0, 2, hashes, "")
        pool.release(hashes, 0)
    assert pool.acquire((), 3)
    assert set(pool.holders()) == {20}


def test_a_block_that_is_evicted_and_computed_again_is_reported_in_that_order() -> None:
    pool = BlockPool(2, 1)
    assert pool.acquire((), 1)
    pool.publish([10], 0, 1, [10], "")
    pool.release([10], 0)
    pool.take_events()
    assert pool.acquire((), 2)
    pool.publish([10, 11], 0, 2, [10, 11], "")
    hashes = engine_hash(10), engine_hash(11)
    assert pool.take_events() == [
        EngineBlocksRemoved(hashes[:1]),
        EngineBlocksStored(hashes, None, [10, 11]),
    ]
