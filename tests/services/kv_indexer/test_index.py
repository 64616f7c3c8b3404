"""The block index against a naive one."""

import gc
import inspect
import os
import random
import shutil
import sysconfig
import tracemalloc
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from libs.common import hashing
from libs.common.kv_events import BlocksStored, Tier
from services.kv_indexer.core.index import BlockIndex, CompiledIndex
from services.kv_indexer.core.python_index import PythonBlockIndex

MODEL, BLOCK_SIZE_TOKENS = "m", 16


class IndexOf:
    """Makes indexes of one class."""

    def __init__(self, index_class: type[BlockIndex]) -> None:
        self.index_class = index_class

    def __call__(self, *, room_blocks: int = 1 << 20, **held: Sequence[int]) -> BlockIndex:
        """With room for so many blocks with a few different sets of holders, and for no more for
        more. Workers are named a, b, ... and get their letter's code as their id."""
        room_bytes = self.index_class.block_bytes * room_blocks
        index = self.index_class(room_bytes + 2 * self.index_class.holders_bytes)
        for name, blocks in held.items():
            index.add(ord(name), MODEL, BLOCK_SIZE_TOKENS)
            index.store(ord(name), blocks)
            index.check_invariants()
        return index


INDEX_CLASSES = [each for each in (PythonBlockIndex, CompiledIndex) if each is not None]


@pytest.fixture(scope="module", params=INDEX_CLASSES, ids=lambda each: each.__name__)
def index_of(request: pytest.FixtureRequest) -> IndexOf:
    return IndexOf(request.param)


def test_the_compiled_index_is_there_wherever_it_can_be_built() -> None:
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    has_headers = FilePath(sysconfig.get_path("include"), "Python.h").exists()
    assert CompiledIndex or not (has_compiler and has_headers), "run `make env`"


def overlap(
    index: BlockIndex, prompt: Sequence[int], slowest: Tier = Tier.DEVICE
) -> dict[str, int]:
    depths = index.overlap(MODEL, BLOCK_SIZE_TOKENS, prompt, slowest)
    return {chr(instance): depth for instance, depth in depths.items()}


class CountingPrompt(list[int]):
    """Counts how often it is looked at."""

    reads = 0

    def __getitem__(self, position: object) -> int:  # type: ignore[override]
        self.reads += 1
        return super().__getitem__(position)  # type: ignore[call-overload, no-any-return]


def test_overlap_counts_the_leading_blocks_that_each_worker_holds(index_of: IndexOf) -> None:
    index = index_of(a=[1, 2, 3], b=[1], c=[9])
    assert overlap(index, [1, 2, 3, 4]) == {"a": 3, "b": 1}


def test_nothing_overlaps_with_an_empty_prompt(index_of: IndexOf) -> None:
    assert overlap(index_of(a=[1]), []) == {}


def test_blocks_past_a_gap_count_for_nothing(index_of: IndexOf) -> None:
    assert overlap(index_of(a=[1, 2, 3, 4], b=[3]), [1, 2, 3, 4]) == {"a": 4}


def test_a_worker_that_left_and_one_that_cleared_its_cache_overlap_with_nothing(
    index_of: IndexOf,
) -> None:
    index = index_of(a=[1, 2], b=[1, 2], c=[1])
    index.remove(ord("a"))
    index.clear(ord("b"))
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"c": 1}


def test_a_worker_that_comes_inherits_nothing_of_one_that_left(index_of: IndexOf) -> None:
    index = index_of(a=[1], b=[1])
    index.remove(ord("a"))
    index.add(ord("c"), MODEL, BLOCK_SIZE_TOKENS)
    index.store(ord("c"), [1, 2])
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"b": 1, "c": 2}


def test_models_share_no_blocks(index_of: IndexOf) -> None:
    index = index_of(a=[1])
    index.add(ord("b"), "another", BLOCK_SIZE_TOKENS)
    index.store(ord("b"), [1, 2])
    assert overlap(index, [1, 2]) == {"a": 1}


def test_a_model_that_nobody_serves_overlaps_with_nothing(index_of: IndexOf) -> None:
    index = index_of(a=[1])
    index.remove(ord("a"))
    assert index.overlap(MODEL, 32, [1]) == {}


def test_another_block_size_than_the_models_overlaps_with_nothing(index_of: IndexOf) -> None:
    assert index_of(a=[1]).overlap(MODEL, 32, [1]) == {}


def test_a_lookup_in_a_long_prompt_touches_few_of_its_blocks(index_of: IndexOf) -> None:
    prompt = CountingPrompt(range(8_192))
    assert overlap(index_of(a=range(8_000)), prompt) == {"a": 8_000}
    assert prompt.reads <= 2 + 13


def test_a_lookup_that_was_made_before_looks_twice_for_each_depth(index_of: IndexOf) -> None:
    prompt = CountingPrompt(range(8_192))
    depths = {"a": 8_000, "b": 4_000, "c": 2_999, "d": 3_000}
    index = index_of(a=range(8_000), b=range(4_000), c=range(2_999), d=range(3_000))
    assert overlap(index, prompt) == depths
    prompt.reads = 0
    assert overlap(index, prompt) == depths
    assert prompt.reads <= 2 + 2 * len(depths)


def test_a_lookup_is_right_whatever_others_ended_elsewhere(index_of: IndexOf) -> None:
    index = index_of(a=[1, 2, 3, 4, 11, 12, 13], b=[1, 2, 11, 12, 13])
    for _ in range(2):
        assert overlap(index, [1, 2, 3, 4, 5]) == {"a": 4, "b": 2}
        assert overlap(index, [1, 2, 11, 12, 13]) == {"a": 5, "b": 5}
        assert overlap(index, [1]) == {"a": 1, "b": 1}


def test_a_block_that_is_named_twice_counts_once(index_of: IndexOf) -> None:
    index = index_of(a=[1, 2], b=[1, 1])
    assert overlap(index, [1, 2]) == {"a": 2, "b": 1}
    index.discard(ord("a"), [2, 2])
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"a": 1, "b": 1}


def test_adapters_and_cache_salts_share_no_blocks_with_each_other(index_of: IndexOf) -> None:
    tokens = range(64)
    keys = [("", ""), ("adapter", ""), ("", "salt"), ("adapter", "salt"), ("", "adapter")]
    chains = [
        hashing.sequence_hashes(tokens, BLOCK_SIZE_TOKENS, lora_name=lora, cache_salt=salt)
        for lora, salt in keys
    ]
    index = index_of()
    for name, hashes in zip("abcde", chains, strict=True):
        index.add(ord(name), MODEL, BLOCK_SIZE_TOKENS)
        index.store(ord(name), hashes)
    for name, hashes in zip("abcde", chains, strict=True):
        assert overlap(index, hashes) == {name: 4}


def test_blocks_may_come_in_an_array(index_of: IndexOf) -> None:
    hashes = array("Q", [1, 1 << 63, (1 << 64) - 1])
    index = index_of(a=hashes)
    index.store(ord("a"), array("Q", [4]), [(0, 1)])
    assert index.held(ord("a")) == {*hashes, 4}
    index.discard(ord("a"), hashes[:0:-1])
    assert overlap(index, array("Q", [1, 4, 5])) == {"a": 2}
    index.store(ord("a"), array("i", [7]), [(0, 1)])
    assert index.held(ord("a")) == {1, 4, 7}


def test_overlap_tells_how_deep_each_worker_is_tier_by_tier(index_of: IndexOf) -> None:
    index = index_of(a=[1, 2], b=[1])
    index.store(ord("a"), [3], [(0, 2)], Tier.HOST)
    index.store(ord("a"), [4], [(0, 3)], Tier.DISK)
    index.store(ord("b"), [1, 2], tier=Tier.HOST)
    index.check_invariants()
    prompt = [1, 2, 3, 4, 5]
    assert overlap(index, prompt) == {"a": 2, "b": 1}
    assert overlap(index, prompt, Tier.HOST) == {"a": 3, "b": 2}
    assert overlap(index, prompt, Tier.DISK) == {"a": 4, "b": 2}


def test_a_block_that_leaves_one_tier_stays_in_another(index_of: IndexOf) -> None:
    index = index_of(a=[1, 2])
    index.store(ord("a"), [1, 2], tier=Tier.HOST)
    index.discard(ord("a"), [2])
    index.check_invariants()
    assert (overlap(index, [1, 2]), overlap(index, [1, 2], Tier.HOST)) == ({"a": 1}, {"a": 2})
    assert index.held(ord("a")) == {1}
    assert index.held(ord("a"), Tier.HOST) == {1, 2}


def test_a_full_index_forgets_what_was_matched_least_recently(index_of: IndexOf) -> None:
    index = index_of(room_blocks=64, a=[])
    for turn in range(20):
        start = 100 * (turn + 1)
        index.store(ord("a"), range(start, start + 16))
        # The first conversation goes on and on.
        assert overlap(index, range(100, 116)) == {"a": 16}
        index.check_invariants()
    assert overlap(index, range(2_000, 2_016)) == {"a": 16}
    assert overlap(index, range(300, 316)) == {}


def test_a_chain_longer_than_the_index_keeps_its_first_blocks(index_of: IndexOf) -> None:
    index = index_of(room_blocks=10, a=range(1, 101))
    index.check_invariants()
    depth = overlap(index, range(1, 101))["a"]
    assert 10 <= depth < 20
    assert index.evicted_blocks(ord("a")) == 100 - depth


def test_blocks_that_follow_an_evicted_one_are_not_taken_in(index_of: IndexOf) -> None:
    index = index_of(room_blocks=10, a=range(1, 101))
    evicted = index.evicted_blocks(ord("a"))
    index.store(ord("a"), [101, 102], [(0, 100)])
    assert index.evicted_blocks(ord("a")) == evicted + 2
    assert overlap(index, [101, 102]) == {}


def test_an_evicted_block_that_its_worker_removes_is_no_longer_counted(index_of: IndexOf) -> None:
    index = index_of(room_blocks=10, a=range(1, 101))
    index.discard(ord("a"), range(100, 0, -1))
    index.check_invariants()
    assert (index.held_blocks(ord("a")), index.evicted_blocks(ord("a"))) == (0, 0)


def test_a_worker_that_is_cleared_or_replaced_starts_without_evicted_blocks(
    index_of: IndexOf,
) -> None:
    index = index_of(room_blocks=10, a=range(1, 101))
    index.replace(ord("a"), [1, 2])
    assert index.held(ord("a")) == {1, 2}
    assert index.evicted_blocks(ord("a")) == 0


def test_eviction_in_one_model_makes_room_for_another(index_of: IndexOf) -> None:
    index = index_of(room_blocks=64, a=range(1, 61))
    index.add(ord("b"), "another", BLOCK_SIZE_TOKENS)
    for start in range(1_000, 2_000, 10):
        index.store(ord("b"), range(start, start + 10))
        index.check_invariants()
    assert index.held_blocks(ord("b")) > 30


@pytest.mark.parametrize("workers", [1, 10])
def test_the_index_takes_no_more_memory_than_it_may_and_uses_most_of_it(
    index_of: IndexOf, workers: int
) -> None:
    max_bytes = 4 << 20
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    try:
        index = index_of.index_class(max_bytes)
        for worker in range(workers):
            index.add(worker, MODEL, BLOCK_SIZE_TOKENS)
        recent = deque[list[int]](maxlen=64)
        taken_bytes = []
        for step in range(3 * max_bytes // index.block_bytes // 64):
            chain = [rng.getrandbits(64) for _ in range(64)]
            for worker in rng.sample(range(workers), min(workers, 3)):
                index.store(worker, chain[: rng.randint(1, 64)])
            recent.append(chain)
            overlap(index, rng.choice(recent))
            if step % 3 == 0:
                gone = rng.choice(recent)
                for worker in range(workers):
                    index.discard(worker, gone[:31:-1])
            if step % 20 == 0:
                taken_bytes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Of the test itself: the latest chains.
    own_bytes = 64 * 64 * 48
    assert max(taken_bytes) - own_bytes <= max_bytes
    assert taken_bytes[-1] >= max_bytes / 3
    assert max_bytes * 0.9 <= index.used_bytes <= max_bytes


Path = tuple[int, ...]
paths = st.lists(st.integers(0, 1), max_size=5).map(tuple)
workers = st.sampled_from("abcd")
tiers = st.sampled_from(Tier)
operations = st.tuples(
    st.sampled_from(
        ["store", "store", "continue", "continue", "discard", "replace", "clear", "leave", "match"]
    ),
    workers,
    paths,
    tiers,
)


def name_of(path: Path) -> int:
    """A stand-in for a sequence hash: names the block and all before it."""
    return int("1" + "".join(map(str, path)), 2)


def prefixes(path: Path) -> list[int]:
    return [name_of(path[:end]) for end in range(1, len(path) + 1)]


def is_at_or_below(block: int, ancestor: int) -> bool:
    return f"{block:b}".startswith(f"{ancestor:b}")


class NaiveIndex:
    """What workers hold, as sets."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Tier, set[int]]] = {}

    def in_any(self, worker: str) -> set[int]:
        return set().union(*self.held[worker].values())

    def overlap(self, prompt: list[int], slowest: Tier) -> dict[str, int]:
        depths = {}
        for worker, tiers in self.held.items():
            reached = set().union(*(tiers[tier] for tier in Tier if tier <= slowest))
            depth = next((n for n, block in enumerate(prompt) if block not in reached), len(prompt))
            if depth:
                depths[worker] = depth
        return depths


def play(
    index: BlockIndex, script: list[tuple[str, str, Path, Tier]], prompts: Sequence[Path] = ()
) -> NaiveIndex:
    """Does the same to the index and to a naive one, checking the index all the time, and what it
    answers to these prompts. Workers keep their promise in every reach of tiers."""
    naive = NaiveIndex()
    for operation, worker, path, tier in script:
        if worker not in naive.held:
            index.add(ord(worker), MODEL, BLOCK_SIZE_TOKENS)
            naive.held[worker] = {tier: set() for tier in Tier}
        held = naive.held[worker]
        match operation:
            case "store":
                index.store(ord(worker), prefixes(path), tier=tier)
                held[tier].update(prefixes(path))
            case "continue":
                # As workers do: only what is new, after the block that it follows.
                known = naive.in_any(worker)
                new = [block for block in prefixes(path) if block not in known]
                if new:
                    before = new[0] >> 1
                    slowest_before = max(
                        (t for t in Tier if before in held[t]), default=Tier.DEVICE
                    )
                    tier = max(tier, slowest_before)
                    index.store(ord(worker), new, [(0, None if before == 1 else before)], tier)
                    held[tier].update(new)
            case "discard":
                for each in Tier:
                    gone = sorted(
                        (b for b in held[each] if is_at_or_below(b, name_of(path))), reverse=True
                    )
                    index.discard(ord(worker), gone, each)
                    held[each].difference_update(gone)
            case "replace":
                index.replace(ord(worker), prefixes(path))
                naive.held[worker] = {tier: set() for tier in Tier}
                naive.held[worker][Tier.DEVICE] = set(prefixes(path))
            case "clear":
                index.clear(ord(worker))
                naive.held[worker] = {tier: set() for tier in Tier}
            case "leave":
                index.remove(ord(worker))
                del naive.held[worker]
            case _:
                overlap(index, prefixes(path), tier)
        index.check_invariants()
        for prompt in map(prefixes, prompts):
            for slowest in Tier:
                assert overlap(index, prompt, slowest) == naive.overlap(prompt, slowest)
    return naive


@given(st.lists(operations, max_size=30), st.lists(paths, max_size=5))
def test_a_roomy_index_agrees_with_sets(
    index_of: IndexOf, script: list[tuple[str, str, Path, Tier]], prompts: list[Path]
) -> None:
    index = index_of()
    naive = play(index, script, prompts)
    for worker, tiers in naive.held.items():
        assert {tier: index.held(ord(worker), tier) for tier in Tier} == tiers
        assert index.evicted_blocks(ord(worker)) == 0


@given(
    st.lists(operations, min_size=10, max_size=80),
    st.lists(paths, max_size=5),
    st.integers(1, 20),
)
@example(
    [
        *[("store", "a", (), Tier.DEVICE)] * 6,
        ("store", "b", (0, 1, 0), Tier.DEVICE),
        ("store", "c", (0, 1, 0), Tier.DEVICE),
        ("store", "a", (1,), Tier.DEVICE),
        ("discard", "b", (0, 1), Tier.DEVICE),
    ],
    [],
    3,
)
def test_a_full_index_holds_a_prefix_closed_part_and_counts_the_rest(
    index_of: IndexOf,
    script: list[tuple[str, str, Path, Tier]],
    prompts: list[Path],
    room_blocks: int,
) -> None:
    index = index_of(room_blocks=room_blocks)
    naive = play(index, script)
    for worker, tiers in naive.held.items():
        held = {tier: index.held(ord(worker), tier) for tier in Tier}
        assert all(held[tier] <= tiers[tier] for tier in Tier)
        anywhere = set[int]().union(*held.values())
        assert all(block >> 1 in anywhere | {1} for block in anywhere)
        forgotten = sum(len(tiers[tier] - held[tier]) for tier in Tier)
        assert forgotten <= index.evicted_blocks(ord(worker))
    for prompt in map(prefixes, prompts):
        most = naive.overlap(prompt, Tier.DISK)
        for worker, depth in overlap(index, prompt, Tier.DISK).items():
            assert depth <= most[worker]


is_compiled = pytest.mark.skipif(CompiledIndex is None, reason="there is no C++ compiler")


@is_compiled
def test_both_indexes_have_the_methods_that_are_promised() -> None:
    assert CompiledIndex is not None
    for name, promised in inspect.getmembers(BlockIndex, inspect.isfunction):
        if name.startswith("_"):
            continue
        parameters = {
            each: [(p.name, p.default) for p in inspect.signature(method).parameters.values()]
            for each in (BlockIndex, PythonBlockIndex, CompiledIndex)
            if (method := getattr(each, name))
        }
        assert len({*map(tuple, parameters.values())}) == 1, promised


class PythonBlockIndexOfThatSize(PythonBlockIndex):
    """Thinks that it takes no more memory than the compiled one, and so evicts when that does."""

    block_bytes = CompiledIndex.block_bytes if CompiledIndex else 0
    holders_bytes = CompiledIndex.holders_bytes if CompiledIndex else 0


@is_compiled
@given(
    st.lists(st.tuples(operations, st.sampled_from([MODEL, "another"])), min_size=10, max_size=80),
    st.integers(1, 40),
)
def test_the_compiled_index_answers_evicts_and_counts_as_the_one_in_python(
    script: list[tuple[tuple[str, str, Path, Tier], str]], room_blocks: int
) -> None:
    assert CompiledIndex is not None
    python = IndexOf(PythonBlockIndexOfThatSize)(room_blocks=room_blocks)
    compiled = IndexOf(CompiledIndex)(room_blocks=room_blocks)
    there = set[int]()
    for (operation, worker, path, tier), model in script:
        instance = ord(worker)
        if instance not in there:
            there.add(instance)
            for index in (python, compiled):
                index.add(instance, model, BLOCK_SIZE_TOKENS)
        method, *arguments = call_of(operation, instance, model, prefixes(path), tier)
        if method == "remove":
            there.remove(instance)
        answers = [getattr(index, method)(*arguments) for index in (python, compiled)]
        assert answers[0] == answers[1]
        compiled.check_invariants()
        assert state_of(compiled, there) == state_of(python, there)


def call_of(
    operation: str, instance: int, model: str, blocks: list[int], tier: Tier
) -> tuple[Any, ...]:
    """A method's name and its arguments."""
    half = len(blocks) // 2
    match operation:
        case "store":
            return "store", instance, blocks, (), tier
        case "continue":
            return "store", instance, blocks[half:], [(0, blocks[half - 1] if half else None)], tier
        case "discard":
            return "discard", instance, blocks[: half - 1 : -1] if half else [], tier
        case "replace":
            return "replace", instance, blocks[:half], (), [BlocksStored(blocks, (), Tier.HOST)]
        case "clear":
            return "clear", instance
        case "leave":
            return "remove", instance
        case _:
            return "overlap", model, BLOCK_SIZE_TOKENS, blocks, tier


def state_of(index: BlockIndex, instances: Iterable[int]) -> dict[Any, Any]:
    of_workers = {
        instance: (
            index.held_blocks(instance),
            index.evicted_blocks(instance),
            [index.held(instance, tier) for tier in Tier],
        )
        for instance in instances
    }
    return {"all": (index.blocks, index.evicted, index.used_bytes)} | of_workers


@is_compiled
def test_the_indexes_agree_where_there_are_hundreds_of_workers() -> None:
    assert CompiledIndex is not None
    rng = random.Random(1)
    python, compiled = PythonBlockIndex(1 << 30), CompiledIndex(1 << 30)
    chain = [rng.getrandbits(64) for _ in range(500)]
    for index in (python, compiled):
        for instance in range(300):
            index.add(instance, MODEL, BLOCK_SIZE_TOKENS)
    for _ in range(1_000):
        instance, depth, tier = rng.randrange(300), rng.randrange(500), rng.choice(list(Tier))
        calls: list[tuple[Any, ...]] = [
            ("store", instance, chain[:depth], (), tier),
            ("discard", instance, chain[:depth:-1], tier),
            ("clear", instance),
            ("overlap", MODEL, BLOCK_SIZE_TOKENS, chain[: depth + 1], tier),
        ]
        method, *arguments = rng.choice(calls)
        answers = [getattr(index, method)(*arguments) for index in (python, compiled)]
        assert answers[0] == answers[1]
    compiled.check_invariants()
    assert [python.held(each) for each in range(300)] == [
        compiled.held(each) for each in range(300)
    ]


def test_memory_is_given_back_when_most_blocks_are_gone(index_of: IndexOf) -> None:
    index = index_of(a=[], b=[])
    gc.collect()
    tracemalloc.start()
    try:
        for instance, start in ((ord("a"), 0), (ord("b"), 50_000)):
            index.store(instance, range(start, start + 50_000))
        index.discard(ord("a"), range(49_999, -1, -1))
        index.discard(ord("b"), range(99_999, 50_500, -1))
        taken_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert overlap(index, range(50_000, 50_600)) == {"b": 501}
    assert taken_bytes <= index.used_bytes + (64 << 10)


def test_a_worker_that_is_not_in_the_index_is_a_key_error(index_of: IndexOf) -> None:
    index = index_of(a=[1])
    with pytest.raises(KeyError, match="98"):
        index.store(ord("b"), [1])
    with pytest.raises(KeyError, match="98"):
        index.remove(ord("b"))
    with pytest.raises(AssertionError):
        index.add(ord("a"), MODEL, BLOCK_SIZE_TOKENS)


@is_compiled
def test_the_compiled_index_refuses_what_it_cannot_read_before_it_changes_anything() -> None:
    assert CompiledIndex is not None
    index: Any = IndexOf(CompiledIndex)(a=[1])
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "store", (ord("a"), [2, "3"])),
        (TypeError, "store", (ord("a"), 2)),
        (TypeError, "store", (ord("a"),)),
        (TypeError, "store", (ord("a"), [2], [3])),
        (ValueError, "store", (ord("a"), [2], [(2, None)])),
        (ValueError, "store", (ord("a"), [2], (), 4)),
        (TypeError, "discard", (ord("a"), [1], 1, 1)),
        (TypeError, "overlap", (1, BLOCK_SIZE_TOKENS, [1])),
        (TypeError, "overlap", (MODEL, BLOCK_SIZE_TOKENS, [None])),
        (OverflowError, "add", (1 << 64, MODEL, BLOCK_SIZE_TOKENS)),
    ]
    for error, method, arguments in bad:
        with pytest.raises(error):
            getattr(index, method)(*arguments)
    with pytest.raises(TypeError):
        index.discard(ord("a"), [1], slowest=1)
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"a": 1}


@is_compiled
def test_the_compiled_index_cannot_be_changed_by_a_prompt_that_is_being_looked_up() -> None:
    assert CompiledIndex is not None
    index = IndexOf(CompiledIndex)(a=[1])

    class Changing(list[int]):
        def __getitem__(self, position: object) -> int:  # type: ignore[override]
            index.clear(ord("a"))
            return 1

    with pytest.raises(RuntimeError):
        overlap(index, Changing([1]))
    assert overlap(index, [1]) == {"a": 1}
