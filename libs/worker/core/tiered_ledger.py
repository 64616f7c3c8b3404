"""What a worker's KV cache holds when it has a host tier below the device. No I/O, clock or logging
in here.

Theory of operation. Readers are told of each tier by itself, and promised of the tiers together
what `kv_ledger` promises of one: holding a block, in a tier or in a faster one, implies holding all
before it so. The device's own account does not depend on the host's and is a KvLedger. A block in
host memory is published there when the block before it is published at all:

    reachable    published on the device, or published in host memory
    published    (there) held there, and the block before it is reachable (or there is none)

So what the device loses can take host blocks out of reach, which are then removed first, and what
it gains can bring them back. Blocks here know which one they follow by its hash, since that one may
be on the device alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from libs.common.hashing import chain, local_hashes, seed_of
from libs.common.kv_events import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    ChainStart,
    KvBatch,
    KvEvent,
    KvSnapshot,
    SequenceHash,
    Tier,
)
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineHash,
    EngineKvEvent,
)
from libs.worker.core.kv_ledger import KvLedger
from libs.worker.core.numbering import MAX_EVENT_BLOCKS, Numbering

_Names = tuple[SequenceHash, SequenceHash | None]
"""A block and the one that it follows."""


class _HostBlock:
    """A block in host memory."""

    __slots__ = ("copies", "is_published", "parent", "sequence_hash")

    def __init__(self, sequence_hash: SequenceHash, parent: SequenceHash | None) -> None:
        self.sequence_hash = sequence_hash
        self.parent = parent
        self.copies = 0
        """Under whichever of the engine's hashes."""
        self.is_published = False


class _Stored:
    """Blocks stored in one tier, and where one does not follow the one before it in the list."""

    __slots__ = ("chains", "hashes", "tier")

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.hashes: list[SequenceHash] = []
        self.chains: list[ChainStart] = []

    def append(self, sequence_hash: SequenceHash, before: SequenceHash | None) -> None:
        if before != (self.hashes[-1] if self.hashes else None):
            self.chains.append((len(self.hashes), before))
        self.hashes.append(sequence_hash)

    def extend(self, other: BlocksStored) -> None:
        if self.hashes and (not other.chains or other.chains[0][0]):
            self.chains.append((len(self.hashes), None))
        self.chains += [(len(self.hashes) + start, before) for start, before in other.chains]
        self.hashes += other.sequence_hashes


class _Removed:
    """Blocks removed from one tier."""

    __slots__ = ("hashes", "tier")

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.hashes: list[SequenceHash] = []


class TieredLedger:
    """One cache's account on the device and in host memory, from when it was empty."""

    def __init__(self, block_size_tokens: int, *, epoch: int) -> None:
        """The epoch must be larger than that of any ledger this worker kept before."""
        self._block_size_tokens = block_size_tokens
        self._numbering = Numbering(epoch)
        self._device = KvLedger(block_size_tokens, epoch=epoch)
        self._blocks: dict[SequenceHash, _HostBlock] = {}
        self._copies: dict[EngineHash, list[_HostBlock]] = {}
        """A list as long as the host tier has copies under that hash."""
        self._followers: dict[SequenceHash, set[SequenceHash]] = {}
        """The blocks here that follow a block, wherever that one is."""
        self._changes: list[_Stored | _Removed | CacheCleared] = []
        """Not numbered yet, oldest first."""
        self.published_host_blocks = 0
        self.evicted_host_blocks = 0
        self._unhashed_host_blocks = 0

    @property
    def epoch(self) -> int:
        return self._numbering.epoch

    @property
    def unhashed_blocks(self) -> int:
        """As of KvLedger, of both tiers."""
        return self._device.unhashed_blocks + self._unhashed_host_blocks

    def apply(self, events: Iterable[EngineKvEvent]) -> None:
        """Takes the engine's changes, in order. Those of tiers below the host are ignored.

        Copies to host memory may be told of before the copies of the blocks that they follow, but
        not in another call.
        """
        early: list[EngineBlocksStored] = []
        for event in events:
            match event:
                case EngineBlocksStored(tier=Tier.HOST):
                    if not self._store(event):
                        early.append(event)
                case EngineBlocksRemoved(engine_hashes, Tier.HOST):
                    self.evicted_host_blocks += len(engine_hashes)
                    for engine_hash in engine_hashes:
                        self._remove(engine_hash)
                    early = [it for it in early if not {*it.engine_hashes} & {*engine_hashes}]
                case EngineBlocksStored(tier=Tier.DISK) | EngineBlocksRemoved(tier=Tier.DISK):
                    pass
                case _:
                    self._device.apply((event,))
                    for change in self._device.take_changes():
                        self._follow(change)
        while early:
            still = [event for event in early if not self._store(event)]
            if len(still) == len(early):
                self._unhashed_host_blocks += sum(len(event.engine_hashes) for event in early)
                return
            early = still

    def cut(self) -> list[KvBatch]:
        """Numbers the changes since the last cut, see Numbering."""
        batches = self._numbering.batches(map(_event, self._changes))
        self._changes.clear()
        return batches

    def tier_blocks(self) -> dict[Tier, int]:
        """Published blocks by tier."""
        return {**self._device.tier_blocks(), Tier.HOST: self.published_host_blocks}

    def tier_evicted_blocks(self) -> dict[Tier, int]:
        """Blocks that the engine has let go of since the beginning, by tier."""
        return {**self._device.tier_evicted_blocks(), Tier.HOST: self.evicted_host_blocks}

    def heartbeat(self) -> KvBatch:
        """Repeats the number of the last batch."""
        return self._numbering.heartbeat()

    def snapshot(self) -> KvSnapshot:
        """All published blocks, as of the last batch: nothing may have changed since the cut."""
        assert not self._changes, "cut first"
        device = self._device.snapshot()
        held = _Stored(Tier.HOST)
        for top in self._blocks.values():
            if top.is_published and not self._is_published_here(top.parent):
                for block in self._published_subtree(top):
                    held.append(block.sequence_hash, block.parent)
        return KvSnapshot(
            self.epoch,
            self._numbering.last,
            device.sequence_hashes,
            device.chains,
            (BlocksStored(held.hashes, held.chains, Tier.HOST),) if held.hashes else (),
        )

    # The device's changes, and what they mean for the host tier

    def _follow(self, change: KvEvent) -> None:
        match change:
            case BlocksStored():
                self._note_all_stored(change)
                if self._blocks:
                    for sequence_hash in change.sequence_hashes:
                        self._publish_followers(sequence_hash)
            case BlocksRemoved(hashes):
                # Told deepest first; whether one is reachable depends on those before it.
                for sequence_hash in reversed(hashes):
                    if not self._is_published_here(sequence_hash):
                        self._unpublish_followers(sequence_hash)
                self._note_removed(hashes, Tier.DEVICE)
            case CacheCleared():
                self._blocks.clear()
                self._copies.clear()
                self._followers.clear()
                self.published_host_blocks = 0
                self._changes = [CacheCleared()]

    # The host tier's own

    def _store(self, event: EngineBlocksStored) -> bool:
        """False, and nothing has changed, when it can't be told which blocks these are."""
        # Mostly the device has them still, and hashing is saved.
        named = self._named(event) or self._hashed(event)
        if named is None:
            return False
        for engine_hash, (sequence_hash, parent) in zip(event.engine_hashes, named, strict=True):
            block = self._blocks.get(sequence_hash)
            if block is None:
                block = self._blocks[sequence_hash] = _HostBlock(sequence_hash, parent)
                if parent is not None:
                    self._followers.setdefault(parent, set()).add(sequence_hash)
            block.copies += 1
            self._copies.setdefault(engine_hash, []).append(block)
            if not block.is_published and self._is_reachable(parent):
                self._publish(block)
        return True

    def _find(self, engine_hash: EngineHash) -> _Names | None:
        """A block by the engine's name, if it is in either tier."""
        if copies := self._copies.get(engine_hash):
            return copies[0].sequence_hash, copies[0].parent
        return self._device.find(engine_hash)

    def _named(self, event: EngineBlocksStored) -> list[_Names] | None:
        """The blocks by their names; None unless all are known."""
        found: list[_Names] = []
        for engine_hash in event.engine_hashes:
            if (names := self._find(engine_hash)) is None:
                return None
            found.append(names)
        return found

    def _hashed(self, event: EngineBlocksStored) -> list[_Names] | None:
        """The blocks by their tokens; None when these are not told, or the parent is not known."""
        first: SequenceHash | None = None
        if event.parent is not None:
            if (parent := self._find(event.parent)) is None:
                return None
            first = parent[0]
        seed = seed_of(lora_name=event.lora_name, cache_salt=event.cache_salt)
        hashes = chain(local_hashes(event.token_ids, self._block_size_tokens, seed), first)
        if len(hashes) != len(event.engine_hashes):
            return None
        return list(zip(hashes, [first, *hashes], strict=False))

    def _remove(self, engine_hash: EngineHash) -> None:
        copies = self._copies.get(engine_hash)
        if copies is None:
            return
        block = copies.pop()
        if not copies:
            del self._copies[engine_hash]
        block.copies -= 1
        if block.copies:
            return
        sequence_hash, parent = block.sequence_hash, block.parent
        if block.is_published:
            if self._device.is_published(sequence_hash):
                block.is_published = False
                self.published_host_blocks -= 1
                self._note_removed((sequence_hash,), Tier.HOST)
            else:
                self._unpublish(block)
        del self._blocks[sequence_hash]
        if parent is not None:
            self._followers[parent].remove(sequence_hash)
            if not self._followers[parent]:
                del self._followers[parent]

    # Published or not

    def _is_published_here(self, sequence_hash: SequenceHash | None) -> bool:
        if sequence_hash is None:
            return False
        block = self._blocks.get(sequence_hash)
        return block is not None and block.is_published

    def _is_reachable(self, sequence_hash: SequenceHash | None) -> bool:
        return (
            sequence_hash is None
            or self._device.is_published(sequence_hash)
            or self._is_published_here(sequence_hash)
        )

    def _following(self, sequence_hash: SequenceHash) -> Iterator[_HostBlock]:
        return map(self._blocks.__getitem__, self._followers.get(sequence_hash, ()))

    def _published_subtree(self, top: _HostBlock) -> Iterator[_HostBlock]:
        """This block, which is published, and what is published here after it; parents first."""
        stack = [top]
        while stack:
            block = stack.pop()
            yield block
            stack.extend(b for b in self._following(block.sequence_hash) if b.is_published)

    def _publish_followers(self, sequence_hash: SequenceHash) -> None:
        for block in self._following(sequence_hash):
            if not block.is_published:
                self._publish(block)

    def _unpublish_followers(self, sequence_hash: SequenceHash) -> None:
        for block in self._following(sequence_hash):
            if block.is_published:
                self._unpublish(block)

    def _publish(self, top: _HostBlock) -> None:
        """Publishes a block and those that are held here after it, parents first."""
        stack = [top]
        while stack:
            block = stack.pop()
            block.is_published = True
            self.published_host_blocks += 1
            self._note_stored(block)
            stack.extend(b for b in self._following(block.sequence_hash) if not b.is_published)

    def _unpublish(self, top: _HostBlock) -> None:
        """Removes a block, which the device has not, and those published after it, deepest
        first."""
        gone = list(self._published_subtree(top))[::-1]
        for block in gone:
            block.is_published = False
        self.published_host_blocks -= len(gone)
        self._note_removed([block.sequence_hash for block in gone], Tier.HOST)

    # Changes to tell

    def _stored(self, tier: Tier, blocks: int) -> _Stored:
        """What takes so many blocks that are stored now."""
        last = self._changes[-1] if self._changes else None
        if (
            not isinstance(last, _Stored)
            or last.tier is not tier
            or len(last.hashes) + blocks > MAX_EVENT_BLOCKS
        ):
            last = _Stored(tier)
            self._changes.append(last)
        return last

    def _note_stored(self, block: _HostBlock) -> None:
        self._stored(Tier.HOST, 1).append(block.sequence_hash, block.parent)

    def _note_all_stored(self, change: BlocksStored) -> None:
        self._stored(Tier.DEVICE, len(change.sequence_hashes)).extend(change)

    def _note_removed(self, hashes: Iterable[SequenceHash], tier: Tier) -> None:
        for sequence_hash in hashes:
            last = self._changes[-1] if self._changes else None
            if (
                not isinstance(last, _Removed)
                or last.tier is not tier
                or len(last.hashes) >= MAX_EVENT_BLOCKS
            ):
                last = _Removed(tier)
                self._changes.append(last)
            last.hashes.append(sequence_hash)

    def check_invariants(self) -> None:
        """For tests: raises AssertionError when what is kept contradicts itself."""
        self._device.check_invariants()
        copies = [block for blocks in self._copies.values() for block in blocks]
        assert self.published_host_blocks == sum(b.is_published for b in self._blocks.values())
        for sequence_hash, block in self._blocks.items():
            assert block.sequence_hash == sequence_hash
            assert block.copies == sum(other is block for other in copies) > 0
            assert block.is_published == self._is_reachable(block.parent)
        following = {(b.parent, h) for h, b in self._blocks.items() if b.parent is not None}
        assert following == {(p, h) for p, hashes in self._followers.items() for h in hashes}
        assert all(self._followers.values())


def _event(change: _Stored | _Removed | CacheCleared) -> KvEvent:
    match change:
        case _Stored():
            return BlocksStored(tuple(change.hashes), tuple(change.chains), change.tier)
        case _Removed():
            return BlocksRemoved(tuple(change.hashes), change.tier)
        case CacheCleared():
            return change
