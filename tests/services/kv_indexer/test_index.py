"""The block index against a naive one."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.kv_indexer.core.index import BlockIndex

MODEL, BLOCK_SIZE_TOKENS = "m", 16


def index_of(*, max_blocks: int = 1_000, **held: Sequence[int]) -> BlockIndex:
    """Workers are named a, b, ... and get their letter's code as their id."""
    index = BlockIndex(max_blocks)
    for name, blocks in held.items():
        index.add(ord(name), MODEL, BLOCK_SIZE_TOKENS)
        index.store(ord(name), blocks)
        index.check_invariants()
    return index


def overlap(index: BlockIndex, prompt: Sequence[int]) -> dict[str, int]:
    depths = index.overlap(MODEL, BLOCK_SIZE_TOKENS, prompt)
    return {chr(instance): depth for instance, depth in depths.items()}


def test_overlap_counts_the_leading_blocks_that_each_worker_holds() -> None:
    index = index_of(a=[1, 2, 3], b=[1], c=[9])
    assert overlap(index, [1, 2, 3, 4]) == {"a": 3, "b": 1}


def test_nothing_overlaps_with_an_empty_prompt() -> None:
    assert overlap(index_of(a=[1]), []) == {}


def test_blocks_past_a_gap_count_for_nothing() -> None:
    assert overlap(index_of(a=[1, 2, 3, 4], b=[3]), [1, 2, 3, 4]) == {"a": 4}


def test_a_worker_that_left_and_one_that_cleared_its_cache_overlap_with_nothing() -> None:
    index = index_of(a=[1, 2], b=[1, 2], c=[1])
    index.remove(ord("a"))
    index.clear(ord("b"))
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"c": 1}


def test_a_worker_that_comes_inherits_nothing_of_one_that_left() -> None:
    index = index_of(a=[1], b=[1])
    index.remove(ord("a"))
    index.add(ord("c"), MODEL, BLOCK_SIZE_TOKENS)
    index.store(ord("c"), [1, 2])
    index.check_invariants()
    assert overlap(index, [1, 2]) == {"b": 1, "c": 2}


def test_models_share_no_blocks() -> None:
    index = index_of(a=[1])
    index.add(ord("b"), "another", BLOCK_SIZE_TOKENS)
    index.store(ord("b"), [1, 2])
    assert overlap(index, [1, 2]) == {"a": 1}


def test_a_model_that_nobody_serves_overlaps_with_nothing() -> None:
    index = index_of(a=[1])
    index.remove(ord("a"))
    assert index.overlap(MODEL, 32, [1]) == {}


def test_another_block_size_than_the_models_overlaps_with_nothing() -> None:
    assert index_of(a=[1]).overlap(MODEL, 32, [1]) == {}


def test_a_full_index_keeps_the_first_blocks_of_what_has_no_room() -> None:
    index = index_of(max_blocks=5, a=[1, 2, 3])
    index.add(ord("b"), MODEL, BLOCK_SIZE_TOKENS)
    assert not index.store(ord("b"), [1, 2, 3])
    index.check_invariants()
    assert overlap(index, [1, 2, 3]) == {"a": 3, "b": 2}


def test_a_full_index_still_takes_what_it_has_already() -> None:
    index = index_of(max_blocks=3, a=[1, 2, 3])
    assert index.store(ord("a"), [1, 2, 3])


def test_a_lookup_in_a_long_prompt_touches_few_of_its_blocks() -> None:
    class CountingPrompt(list[int]):
        reads = 0

        def __getitem__(self, position: object) -> int:  # type: ignore[override]
            self.reads += 1
            return super().__getitem__(position)  # type: ignore[call-overload, no-any-return]

    prompt = CountingPrompt(range(8_192))
    assert overlap(index_of(max_blocks=9_000, a=range(8_000)), prompt) == {"a": 8_000}
    assert prompt.reads <= 1 + 13


Path = tuple[int, ...]
paths = st.lists(st.integers(0, 1), max_size=5).map(tuple)
workers = st.sampled_from("abcd")
operations = st.tuples(
    st.sampled_from(["store", "store", "store", "discard", "replace", "clear", "leave"]),
    workers,
    paths,
)


def name_of(path: Path) -> int:
    """A stand-in for a sequence hash: names the block and all before it."""
    return int("1" + "".join(map(str, path)), 2)


def prefixes(path: Path) -> list[int]:
    return [name_of(path[:end]) for end in range(1, len(path) + 1)]


def descendants(held: set[int], path: Path) -> list[int]:
    """Held blocks from this one on, deepest first."""
    below = f"{name_of(path):b}"
    return sorted((block for block in held if f"{block:b}".startswith(below)), reverse=True)


@given(st.lists(operations, max_size=30), st.lists(paths, max_size=5))
def test_the_index_agrees_with_a_set_for_each_worker(
    script: list[tuple[str, str, Path]], prompts: list[Path]
) -> None:
    index, naive = BlockIndex(10_000), dict[str, set[int]]()
    for operation, worker, path in script:
        if worker not in naive:
            index.add(ord(worker), MODEL, BLOCK_SIZE_TOKENS)
            naive[worker] = set()
        held = naive[worker]
        match operation:
            case "store":
                index.store(ord(worker), prefixes(path))
                held.update(prefixes(path))
            case "discard":
                gone = descendants(held, path)
                index.discard(ord(worker), gone)
                held.difference_update(gone)
            case "replace":
                index.replace(ord(worker), prefixes(path))
                naive[worker] = set(prefixes(path))
            case "clear":
                index.clear(ord(worker))
                held.clear()
            case _:
                index.remove(ord(worker))
                del naive[worker]
        index.check_invariants()
    assert all(index.held(ord(worker)) == held for worker, held in naive.items())
    for prompt in map(prefixes, prompts):
        expected = {
            worker: depth
            for worker, held in naive.items()
            if (depth := sum(block in held for block in prompt))
        }
        assert overlap(index, prompt) == expected


@given(st.lists(st.tuples(workers, paths), max_size=30), st.integers(1, 20))
def test_a_full_index_holds_a_prefix_closed_part_within_its_bound(
    stores: list[tuple[str, Path]], max_blocks: int
) -> None:
    index = index_of(max_blocks=max_blocks, a=[], b=[], c=[], d=[])
    is_full = set[str]()
    for worker, path in stores:
        if worker not in is_full and not index.store(ord(worker), prefixes(path)):
            is_full.add(worker)
        index.check_invariants()
    for worker in "abcd":
        held = index.held(ord(worker))
        assert all(block == 1 or block >> 1 in held | {1} for block in held)
