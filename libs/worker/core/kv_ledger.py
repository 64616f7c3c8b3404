"""What a worker's KV cache holds, told in sequence hashes. No I/O, clock or logging in here.

Theory of operation. An engine names blocks by hashes of its own, may hold several copies of a
block, and may drop a block while keeping those that follow it. Readers are promised something
simpler: each block is held or not, and holding one implies holding all before it. So the ledger
keeps two facts for each block:

    held        the engine has at least one copy
    published   held, and the block before it is published (or there is none)

and tells readers of changes to `published` only. When the engine drops a block in the middle, its
published descendants are removed with it, deepest first; when it comes back, the descendants that
are still held are stored again. Blocks form a tree, since a sequence hash names all before it. A
dropped block stays in the tree, neither held nor published, while it has descendants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import assert_never

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
    EngineCacheCleared,
    EngineHash,
    EngineKvEvent,
)
from libs.worker.core.numbering import MAX_EVENT_BLOCKS, Numbering

_NO_CHILDREN: dict[SequenceHash, _Block] = {}
"""Of all blocks without, to be replaced and not added to."""


class _Block:
    """A node of the tree."""

    __slots__ = ("children", "copies", "is_published", "parent", "sequence_hash")

    def __init__(self, sequence_hash: SequenceHash, parent: _Block | None) -> None:
        self.sequence_hash = sequence_hash
        self.parent = parent
        self.children: dict[SequenceHash, _Block] = _NO_CHILDREN
        """Made with the first child."""
        self.copies = 0
        """How many the engine has, under whichever of its hashes."""
        self.is_published = False

    @property
    def parent_hash(self) -> SequenceHash | None:
        return None if self.parent is None else self.parent.sequence_hash

    def published_subtree(self) -> Iterator[_Block]:
        """This block, which is published, and its published descendants; parents first."""
        stack = [self]
        while stack:
            block = stack.pop()
            yield block
            stack.extend(child for child in block.children.values() if child.is_published)


class _Chains:
    """Blocks in a list, and where one does not follow the one before it there."""

    __slots__ = ("hashes", "starts")

    def __init__(self) -> None:
        self.hashes: list[SequenceHash] = []
        self.starts: list[ChainStart] = []

    def extend(self, hashes: Sequence[SequenceHash], before: SequenceHash | None) -> None:
        """Adds blocks in a row that follow `before`."""
        if before != (self.hashes[-1] if self.hashes else None):
            self.starts.append((len(self.hashes), before))
        self.hashes += hashes


class KvLedger:
    """One cache's account, from when it was empty. Of one tier: for two see `tiered_ledger`."""

    def __init__(self, block_size_tokens: int, *, epoch: int) -> None:
        """The epoch must be larger than that of any ledger this worker kept before."""
        self._block_size_tokens = block_size_tokens
        self.epoch = epoch
        self._numbering = Numbering(epoch)
        self._blocks: dict[SequenceHash, _Block] = {}
        self._copies: dict[EngineHash, _Block | list[_Block]] = {}
        """With more than one copy under that hash a list, as long as there are."""
        self._changes: list[_Chains | list[SequenceHash]] = []
        """Published changes that are not numbered yet, oldest first: stored or removed."""
        self._is_clear_pending = False
        """Whether CacheCleared comes before those."""
        self.published_blocks = 0
        self.evicted_blocks = 0
        """That the engine has let go of since the beginning."""
        self.unhashed_blocks = 0
        """Stored by the engine but never told to readers, since the block before is not known or
        the tokens are not those of full blocks: so many since the beginning."""

    def apply(self, events: Iterable[EngineKvEvent]) -> None:
        """Takes the engine's changes, in order.

        An engine tells of every copy: a block stored twice is there until it is removed twice.
        Removing what is not there changes nothing.
        """
        for event in events:
            match event:
                case EngineBlocksStored():
                    self._store(event)
                case EngineBlocksRemoved():
                    self.evicted_blocks += len(event.engine_hashes)
                    self._remove(event.engine_hashes)
                case EngineCacheCleared():
                    self._clear()
                case _:
                    assert_never(event)

    def cut(self) -> list[KvBatch]:
        """Numbers the changes since the last cut, see Numbering."""
        return self._numbering.batches(self.take_changes())

    def take_changes(self) -> list[KvEvent]:
        """The changes since the last cut as events, which are then not numbered here."""
        events: list[KvEvent] = [CacheCleared()] if self._is_clear_pending else []
        for change in self._changes:
            if isinstance(change, _Chains):
                events.append(BlocksStored(tuple(change.hashes), tuple(change.starts)))
            else:
                events.append(BlocksRemoved(tuple(change)))
        self._changes.clear()
        self._is_clear_pending = False
        return events

    def find(self, engine_hash: EngineHash) -> tuple[SequenceHash, SequenceHash | None] | None:
        """A held block, and the one that it follows; None when none is held by that name."""
        copies = self._copies.get(engine_hash)
        if copies is None:
            return None
        block = copies[0] if isinstance(copies, list) else copies
        return block.sequence_hash, block.parent_hash

    def is_published(self, sequence_hash: SequenceHash) -> bool:
        """Whether readers are told of the block."""
        block = self._blocks.get(sequence_hash)
        return block is not None and block.is_published

    def tier_blocks(self) -> dict[Tier, int]:
        """Published blocks by tier."""
        return {Tier.DEVICE: self.published_blocks}

    def tier_evicted_blocks(self) -> dict[Tier, int]:
        """Blocks that the engine has let go of since the beginning, by tier."""
        return {Tier.DEVICE: self.evicted_blocks}

    def heartbeat(self) -> KvBatch:
        """Repeats the number of the last batch."""
        return self._numbering.heartbeat()

    def snapshot(self) -> KvSnapshot:
        """All published blocks, as of the last batch: nothing may have changed since the cut."""
        assert not self._changes, "cut first"
        assert not self._is_clear_pending, "cut first"
        held = _Chains()
        for root in self._blocks.values():
            if root.parent is None and root.is_published:
                for block in root.published_subtree():
                    held.extend((block.sequence_hash,), block.parent_hash)
        return KvSnapshot(self.epoch, self._numbering.last, held.hashes, held.starts)

    def _store(self, event: EngineBlocksStored) -> None:
        parent: _Block | None = None
        if event.parent is not None:
            copies = self._copies.get(event.parent)
            if copies is None:
                self.unhashed_blocks += len(event.engine_hashes)
                return
            parent = copies[0] if isinstance(copies, list) else copies
        sequence_hashes = event.sequence_hashes
        if sequence_hashes is None:
            seed = seed_of(lora_name=event.lora_name, cache_salt=event.cache_salt)
            sequence_hashes = chain(
                local_hashes(event.token_ids, self._block_size_tokens, seed),
                None if parent is None else parent.sequence_hash,
            )
        if len(sequence_hashes) != len(event.engine_hashes):
            self.unhashed_blocks += len(event.engine_hashes)
            return
        blocks = self._blocks
        known = 0
        for engine_hash, sequence_hash in zip(event.engine_hashes, sequence_hashes, strict=True):
            block = blocks.get(sequence_hash)
            if block is None:
                break
            known += 1
            block.copies += 1
            self._add_copy(engine_hash, block)
            if not block.is_published and (parent is None or parent.is_published):
                self._publish(block)
            parent = block
        self._store_new(event.engine_hashes[known:], sequence_hashes[known:], parent)

    def _store_new(
        self,
        engine_hashes: Sequence[EngineHash],
        sequence_hashes: Sequence[SequenceHash],
        parent: _Block | None,
    ) -> None:
        """Of blocks in a row, what follows the first one that is not in the tree: it is not there
        either."""
        if not sequence_hashes:
            return
        blocks, copies = self._blocks, self._copies
        before = parent
        is_published = parent is None or parent.is_published
        for engine_hash, sequence_hash in zip(engine_hashes, sequence_hashes, strict=True):
            block = blocks[sequence_hash] = _Block(sequence_hash, before)
            block.copies = 1
            block.is_published = is_published
            if before is not None:
                if before.children is _NO_CHILDREN:
                    before.children = {sequence_hash: block}
                else:
                    before.children[sequence_hash] = block
            if engine_hash in copies:
                self._add_copy(engine_hash, block)
            else:
                copies[engine_hash] = block
            before = block
        if is_published:
            self._note_stored(sequence_hashes, None if parent is None else parent.sequence_hash)

    def _add_copy(self, engine_hash: EngineHash, block: _Block) -> None:
        copies = self._copies.get(engine_hash)
        if copies is None:
            self._copies[engine_hash] = block
        elif isinstance(copies, list):
            copies.append(block)
        else:
            self._copies[engine_hash] = [copies, block]

    def _remove(self, engine_hashes: Sequence[EngineHash]) -> None:
        copies_of = self._copies
        for engine_hash in engine_hashes:
            block = copies_of.pop(engine_hash, None)
            if block is None:
                continue
            if isinstance(block, list):
                *rest, block = block
                copies_of[engine_hash] = rest if len(rest) > 1 else rest[0]
            block.copies -= 1
            if not block.copies:
                if block.is_published:
                    self._unpublish(block)
                self._forget(block)

    def _forget(self, block: _Block | None) -> None:
        """Takes a block out of the tree if nothing needs it, and then those it was kept for."""
        while block is not None and not block.copies and not block.children:
            del self._blocks[block.sequence_hash]
            if block.parent is not None:
                del block.parent.children[block.sequence_hash]
            block = block.parent

    def _clear(self) -> None:
        self._blocks.clear()
        self._copies.clear()
        self._changes.clear()
        self._is_clear_pending = True
        self.published_blocks = 0

    def _publish(self, block: _Block) -> None:
        """Publishes a block and its held descendants, parents first."""
        stack = [block]
        while stack:
            block = stack.pop()
            block.is_published = True
            self._note_stored((block.sequence_hash,), block.parent_hash)
            stack.extend(child for child in block.children.values() if child.copies)

    def _unpublish(self, block: _Block) -> None:
        """Removes a block and its published descendants, deepest first."""
        if block.children:
            for gone in reversed(list(block.published_subtree())):
                self._note_removed(gone)
        else:
            self._note_removed(block)

    def _note_stored(self, hashes: Sequence[SequenceHash], before: SequenceHash | None) -> None:
        """Blocks in a row are published. `before` is what the first one follows."""
        self.published_blocks += len(hashes)
        for start in range(0, len(hashes), MAX_EVENT_BLOCKS):
            part = hashes[start : start + MAX_EVENT_BLOCKS]
            last = self._changes[-1] if self._changes else None
            if not isinstance(last, _Chains) or len(last.hashes) + len(part) > MAX_EVENT_BLOCKS:
                last = _Chains()
                self._changes.append(last)
            last.extend(part, hashes[start - 1] if start else before)

    def _note_removed(self, block: _Block) -> None:
        block.is_published = False
        self.published_blocks -= 1
        last = self._changes[-1] if self._changes else None
        if not isinstance(last, list) or len(last) >= MAX_EVENT_BLOCKS:
            last = []
            self._changes.append(last)
        last.append(block.sequence_hash)

    def check_invariants(self) -> None:
        """For tests: raises AssertionError when what is kept contradicts itself."""
        assert not _NO_CHILDREN
        lists = [each if isinstance(each, list) else [each] for each in self._copies.values()]
        copies = [block for blocks in lists for block in blocks]
        assert self.published_blocks == sum(b.is_published for b in self._blocks.values())
        for sequence_hash, block in self._blocks.items():
            assert block.sequence_hash == sequence_hash
            assert block.copies == sum(other is block for other in copies)
            assert block.copies or block.children
            is_parent_published = block.parent is None or block.parent.is_published
            assert block.is_published == (bool(block.copies) and is_parent_published)
            if block.parent is not None:
                assert self._blocks[block.parent.sequence_hash] is block.parent
                assert block.parent.children[sequence_hash] is block
