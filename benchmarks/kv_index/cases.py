"""What is measured, and the data for it. Standard library only: both environments import it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["own", "whole", "ragged", "memory"]

EVENT_BLOCKS = 64
SHORT_PROMPT_BLOCKS, LONG_PROMPT_BLOCKS = 64, 8_192
OWN_CHAINS = 2_048


@dataclass(frozen=True)
class Case:
    """One index is filled, asked and emptied again."""

    kind: Kind
    """own: every worker has chains of its own; whole: all have the same chain; ragged: all have
    the beginning of the same chain, each another depth; memory: what a million blocks take."""
    workers: int
    blocks: int
    """Of a chain, which is also the prompt asked for."""
    lookups: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.workers} x {self.blocks}"


_LOOKUPS = {SHORT_PROMPT_BLOCKS: 3_000, LONG_PROMPT_BLOCKS: 300}
WORKERS = (1, 10, 100, 1_000)

FULL = (
    *(Case("own", workers, EVENT_BLOCKS, 0) for workers in WORKERS),
    *(Case("whole", workers, n, _LOOKUPS[n]) for n in _LOOKUPS for workers in WORKERS),
    *(Case("ragged", workers, n, _LOOKUPS[n]) for n in _LOOKUPS for workers in WORKERS[1:]),
    *(Case("memory", workers, EVENT_BLOCKS, 0) for workers in (1, 10)),
)
QUICK = tuple(case for case in FULL if case.workers in (10, 100) and case.kind != "memory")


@dataclass(frozen=True)
class Chain:
    """A prompt's blocks. Switchgear goes by sequence hashes alone; Dynamo stores both and is asked
    by local hashes."""

    sequence_hashes: list[int]
    local_hashes: list[int]

    def first(self, blocks: int) -> Chain:
        return Chain(self.sequence_hashes[:blocks], self.local_hashes[:blocks])


class Side(Protocol):
    """One of the two systems, with an index that is empty at first."""

    def stored_event(self, chain: Chain) -> bytes:
        """A worker's message that it has the chain, as it comes from the network."""

    def removed_event(self, chain: Chain) -> bytes:
        """The message that the chain is gone, last block first."""

    def add(self, worker: int) -> None: ...

    def apply(self, worker: int, event: bytes) -> None: ...

    def overlap(self, chain: Chain) -> dict[int, int]:
        """Leading blocks that each worker holds."""

    def remove(self, worker: int) -> None:
        """The worker is gone."""

    def settle(self) -> None:
        """Returns when all before is done."""


def make_chain(rng: random.Random, blocks: int) -> Chain:
    return Chain(
        [rng.getrandbits(64) for _ in range(blocks)], [rng.getrandbits(64) for _ in range(blocks)]
    )
