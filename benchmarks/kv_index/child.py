"""Measures one side, case by case: a case comes in as a line of JSON, its figures go out as one.

A process of its own for each side, since Dynamo has its own environment.
"""

import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.kv_index.cases import OWN_CHAINS, Case, Chain, Side, make_chain

PAGE_BYTES = 4_096
MEMORY_BLOCKS = 1_000_000


class WrongAnswerError(Exception):
    """A side did not find what it was told."""


def measure(case: Case, make: Callable[[], Side], seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    side = make()
    for worker in range(1, case.workers + 1):
        side.add(worker)
    match case.kind:
        case "own":
            return _own(case, side, rng)
        case "memory":
            return _memory(case, side, rng)
        case _:
            return _shared(case, side, rng)


def _own(case: Case, side: Side, rng: random.Random) -> dict[str, float]:
    chains = [make_chain(rng, case.blocks) for _ in range(OWN_CHAINS)]
    stored = [side.stored_event(chain) for chain in chains]
    removed = [side.removed_event(chain) for chain in chains[::2]]
    workers = [1 + number % case.workers for number in range(OWN_CHAINS)]

    started = time.perf_counter()
    for worker, event in zip(workers, stored, strict=True):
        side.apply(worker, event)
    side.settle()
    store_seconds = time.perf_counter() - started
    _expect(side, chains[1], {workers[1]: case.blocks})

    started = time.perf_counter()
    for worker, event in zip(workers[::2], removed, strict=True):
        side.apply(worker, event)
    side.settle()
    remove_seconds = time.perf_counter() - started
    _expect(side, chains[0], {})
    _expect(side, chains[1], {workers[1]: case.blocks})

    leave_seconds = _leave(case, side)
    blocks = OWN_CHAINS * case.blocks
    return {
        "stored_blocks_per_second": blocks / store_seconds,
        "removed_blocks_per_second": blocks / 2 / remove_seconds,
        "left_blocks_per_second": blocks / 2 / leave_seconds,
    }


def _shared(case: Case, side: Side, rng: random.Random) -> dict[str, float]:
    chain = make_chain(rng, case.blocks)
    depths = dict.fromkeys(range(1, case.workers + 1), case.blocks)
    if case.kind == "ragged":
        depths = {worker: max(1, case.blocks * worker // case.workers) for worker in depths}
    # All workers' messages are the same but for their length.
    messages = dict.fromkeys(depths.values(), b"")
    figures = {}
    if case.kind == "whole":
        messages = {depth: side.stored_event(chain.first(depth)) for depth in messages}
        started = time.perf_counter()
        for worker, depth in depths.items():
            side.apply(worker, messages[depth])
        side.settle()
        blocks = sum(depths.values())
        figures["stored_blocks_per_second"] = blocks / (time.perf_counter() - started)
    else:
        for worker, depth in depths.items():
            side.apply(worker, side.stored_event(chain.first(depth)))
    _expect(side, chain, depths)
    figures |= _lookups(side, chain, case.lookups, "")
    if case.kind == "whole":
        unknown = make_chain(rng, case.blocks)
        _expect(side, unknown, {})
        figures |= _lookups(side, unknown, case.lookups, "unknown_")
        figures["left_blocks_per_second"] = sum(depths.values()) / _leave(case, side)
    return figures


def _memory(case: Case, side: Side, rng: random.Random) -> dict[str, float]:
    """All workers hold the same million blocks."""
    side.settle()
    gc.collect()
    before_bytes = _resident_bytes()
    for _ in range(MEMORY_BLOCKS // case.blocks):
        event = side.stored_event(make_chain(rng, case.blocks))
        for worker in range(1, case.workers + 1):
            side.apply(worker, event)
    side.settle()
    gc.collect()
    return {"bytes_per_million_blocks": float(_resident_bytes() - before_bytes)}


def _lookups(side: Side, chain: Chain, count: int, prefix: str) -> dict[str, float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        side.overlap(chain)
        seconds.append(time.perf_counter() - started)
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{prefix}lookup_p50_seconds": cuts[49], f"{prefix}lookup_p99_seconds": cuts[98]}


def _leave(case: Case, side: Side) -> float:
    started = time.perf_counter()
    for worker in range(1, case.workers + 1):
        side.remove(worker)
    side.settle()
    return time.perf_counter() - started


def _expect(side: Side, chain: Chain, depths: dict[int, int]) -> None:
    if (found := side.overlap(chain)) != depths:
        raise WrongAnswerError(f"expected {len(depths)} workers, found {len(found)}")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def main() -> None:
    make: Callable[[], Side]
    match sys.argv[1]:
        case "dynamo":
            from benchmarks.kv_index.dynamo_side import DynamoSide

            make = DynamoSide
        case "switchgear":
            from benchmarks.kv_index.switchgear_side import SwitchgearSide

            make = SwitchgearSide
        case _:
            from benchmarks.kv_index.switchgear_side import SwitchgearSide
            from services.kv_indexer.core.python_index import PythonBlockIndex

            make = partial(SwitchgearSide, PythonBlockIndex)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(measure(Case(**task["case"]), make, task["seed"])), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
