"""Which workers hold which KV blocks: what an index promises, and which one is used.

There are two that give the same answers. The compiled one is in `native/`: `make env` builds it
where there is a C++ compiler, and again after it was changed. The one in Python tells how both
work, is what the compiled one is tested against, and is used where that was not built. A change
goes into both. No I/O, clock or logging in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import ClassVar, Protocol, cast

from libs.common.kv_events import BlocksStored, ChainStart, InstanceId, SequenceHash, Tier
from services.kv_indexer.core.python_index import PythonBlockIndex


class BlockIndex(Protocol):
    """Prefix overlap by sequence hash, of many models.

    Takes no more than `max_bytes` of memory. Where more is needed it evicts the blocks that were
    not matched for longest, none before those that follow it, and blocks that would follow an
    evicted one are not taken in. What is in is right all the same.

    Workers that are not in the index raise KeyError. Of hashes that are not numbers of 64 bits the
    compiled index raises TypeError or OverflowError, before it has changed anything.
    """

    block_bytes: ClassVar[int]
    """Of memory for a block, whoever holds it."""
    holders_bytes: ClassVar[int]
    """Of memory for a set of holders, and more where there are many workers."""

    def __init__(self, max_bytes: int) -> None: ...

    @property
    def blocks(self) -> int:
        """Held now, once for every worker and tier."""

    @property
    def evicted(self) -> int:
        """So many were evicted or not taken in since the beginning."""

    @property
    def used_bytes(self) -> int:
        """An upper bound of the memory taken."""

    def add(self, instance: InstanceId, model: str, block_size_tokens: int) -> None:
        """Adds a worker that holds nothing yet. It must not be in the index."""

    def remove(self, instance: InstanceId) -> None:
        """Forgets a worker and what it holds, and its model with the model's last worker."""

    def store(
        self,
        instance: InstanceId,
        hashes: Sequence[SequenceHash],
        chains: Sequence[ChainStart] = (),
        tier: Tier = Tier.DEVICE,
    ) -> None:
        """Adds blocks; those held already change nothing. For `chains` see
        libs.common.kv_events.BlocksStored.

        May evict blocks, of these too. Those that follow an evicted one count as evicted.
        """

    def discard(
        self, instance: InstanceId, hashes: Sequence[SequenceHash], tier: Tier = Tier.DEVICE
    ) -> None:
        """Removes blocks from a tier. Those not held there change nothing, or were evicted and are
        no longer counted as such. May evict others."""

    def clear(self, instance: InstanceId) -> None:
        """Removes all of a worker's blocks, those evicted included.

        Takes time for every set of holders that is its own or is shared, not for every block,
        unless that leaves most blocks of the index without a holder.
        """

    def replace(
        self,
        instance: InstanceId,
        hashes: Sequence[SequenceHash],
        chains: Sequence[ChainStart] = (),
        lower_tiers: Sequence[BlocksStored] = (),
    ) -> None:
        """Makes a worker hold exactly these blocks: in its fastest tier, and in others. Parameters
        as of `store`."""

    def overlap(
        self,
        model: str,
        block_size_tokens: int,
        prompt: Sequence[SequenceHash],
        slowest: Tier = Tier.DEVICE,
    ) -> dict[InstanceId, int]:
        """Leading blocks of the prompt that each worker holds in this tier or in a faster one,
        without workers that hold none. They were useful, and will be evicted later for it.

        Looks at a logarithmic number of the prompt's blocks for each different depth, so the
        prompt may be any sequence with cheap indexing.
        """

    def has_lower_tiers(self, model: str, block_size_tokens: int) -> bool:
        """Whether asking for a tier below the device can give more than asking for the device."""

    def held(self, instance: InstanceId, tier: Tier = Tier.DEVICE) -> frozenset[SequenceHash]:
        """A copy of what a worker holds in a tier. Looks at all blocks of its model."""

    def held_blocks(self, instance: InstanceId) -> int:
        """How many blocks a worker holds here, once for each tier."""

    def evicted_blocks(self, instance: InstanceId) -> int:
        """How many blocks a worker holds that are not here since they were evicted, or would have
        followed one that was: as many as `held` may lack without being wrong."""

    def check_invariants(self) -> None:
        """For tests: raises AssertionError when what is kept contradicts itself."""


def _compiled_module() -> ModuleType | None:
    try:
        return import_module("switchgear_block_index")
    except ModuleNotFoundError:
        return None


COMPILED_MODULE = _compiled_module()

CompiledIndex: type[BlockIndex] | None = (
    cast("type[BlockIndex]", COMPILED_MODULE.BlockIndex) if COMPILED_MODULE else None
)
"""None where it was not built."""

FastestIndex: type[BlockIndex] = CompiledIndex or PythonBlockIndex
"""The one to use."""
