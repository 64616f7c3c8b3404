"""Which workers hold which KV blocks, in Python: what the compiled index is tested against, and
what is used where that was not built. No I/O, clock or logging in here.

Theory of operation. A sequence hash names a block and all before it, so no tree is needed: each
model has a flat map from sequence hash to holders. Neighbours mostly have the same holders, so each
set of holders exists once, as bit masks with one bit for each worker, and blocks point to it. Whole
chains thus change hands by a few operations on the map, or by one on the set when it has no other
blocks.

Workers promise that holding a block implies holding all before it. Along a prompt the holders thus
only ever become fewer, so wherever two positions have the same holders, so has everything between
them, and the depth of each match is found by bisecting instead of walking. Prompts that begin alike
are asked for again and again, so a set of holders also remembers where it ended and who went on:
where two looks show that it still does, neither bisecting nor bit masks are needed.

    generations   oldest [a b c d]   [e f g]   [h i] newest
                                ^ evicted next

When memory is used up, the least useful blocks are evicted, and the promise must outlive that. So
the map is cut into generations, each in order of insertion, and two rules keep every block in a
generation no older than those of the blocks that follow it, and within a generation before them:
a new block goes to the end of the generation of the block before it, and a match moves the matched
blocks, in order, to the newest. What comes last in the oldest generation is thus followed by
nothing, and no other block has gone unmatched for longer, give or take a generation.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import ClassVar

from libs.common.kv_events import BlocksStored, ChainStart, InstanceId, SequenceHash, Tier

GENERATIONS = 4
"""Of a full index, or a few more. More tell the useful from the useless better; fewer make lookups
in a full index quicker."""

FEW_BLOCKS = 4
"""So few are quicker looked at one by one."""

MAX_TABLE_BYTES, SPARE_TABLE_BYTES = 112, 16_384
"""A dict is made anew when it takes more than so many bytes for a block, and some."""

MAX_EXPANDED_INSTANCES = 65_536
"""In the cached expansions of a model's masks: 1 MiB or so."""

_Masks = tuple[int, int, int]
"""Workers' bits, for each tier."""


_Step = tuple[int, int, int, tuple[InstanceId, ...]]
"""Workers' bits on this side and on the other; the bits on both, and the workers on this alone."""

_NOBODY: _Masks = (0, 0, 0)


class _Holders:
    """Those who hold some blocks, and in which tiers."""

    __slots__ = ("blocks", "end", "is_held", "masks", "reach", "step")

    def __init__(self, masks: _Masks, end: int = 0) -> None:
        self.blocks = 0
        """How many have these holders."""
        self.end = end
        """Where in a prompt others followed when that was last looked for, and so a guess for the
        next time; 0 when it never was."""
        self.set_masks(masks)

    def set_masks(self, masks: _Masks) -> None:
        self.masks = masks
        device, host, disk = masks
        self.reach = (device, device | host, device | host | disk)
        """Who holds them in this tier or in a faster one."""
        self.is_held = self.reach[-1] != 0
        """False once the last one has left."""
        self.step: _Step | None = None
        """What came of going on to others when that was last done."""

    @property
    def masks_bytes(self) -> int:
        """What they take where workers are many."""
        return 6 * (self.reach[-1].bit_length() // 7)


_Generation = dict[SequenceHash, _Holders]
_Place = tuple[_Generation, _Holders] | tuple[None, None]


class _Worker:
    """One worker's share of the index. Blocks count once for each tier."""

    __slots__ = ("bit", "evicted", "held", "model", "sets")

    def __init__(self, model: _Model, bit: int) -> None:
        self.model = model
        self.bit = bit
        self.held = 0
        self.evicted = 0
        self.sets: dict[_Holders, None] = {}
        """Those that have blocks and nobody else is in, in no order that matters."""


class _Model:
    """What is held of one model, at one block size."""

    __slots__ = (
        "_expanded_instances",
        "_free_bits",
        "_instances",
        "born",
        "expanded",
        "generations",
        "has_lower_tiers",
        "known_sets",
        "shared_sets",
        "workers",
    )

    def __init__(self) -> None:
        self.generations: list[_Generation] = [{}]
        """Oldest first. No block is in two."""
        self.born = 0
        """The turn that the newest began in."""
        self.shared_sets: dict[_Holders, None] = {}
        """All that have blocks and more than one worker, in no order that matters."""
        self.known_sets: dict[_Masks, _Holders] = {}
        """By masks, to be shared. A worker that goes may make sets equal, so not all are here."""
        self.workers: set[InstanceId] = set()
        self.has_lower_tiers = False
        """Whether anything was ever stored below the device."""
        self._instances: list[InstanceId] = []
        """By number of the bit, of workers that left, too."""
        self._free_bits: list[int] = []
        """Of workers that left, for those to come."""
        self.expanded: dict[int, tuple[InstanceId, ...]] = {}
        self._expanded_instances = 0

    def take_bit(self, instance: InstanceId) -> int:
        if self._free_bits:
            bit = self._free_bits.pop()
            self._instances[bit.bit_length() - 1] = instance
        else:
            bit = 1 << len(self._instances)
            self._instances.append(instance)
        self.workers.add(instance)
        self.expanded.clear()
        self._expanded_instances = 0
        return bit

    def instance(self, bit: int) -> InstanceId:
        """The worker whose bit it is."""
        return self._instances[bit.bit_length() - 1]

    def give_back_bit(self, instance: InstanceId, bit: int) -> None:
        self.workers.remove(instance)
        self._free_bits.append(bit)

    def expand(self, mask: int) -> tuple[InstanceId, ...]:
        """The workers whose bits these are."""
        if (instances := self.expanded.get(mask)) is None:
            bits = map("1".__eq__, bin(mask)[:1:-1])
            instances = tuple(compress(self._instances, bits))
            self._expanded_instances += len(instances)
            if self._expanded_instances > MAX_EXPANDED_INSTANCES:
                self.expanded.clear()
                self._expanded_instances = len(instances)
            self.expanded[mask] = instances
        return instances

    def step(self, holding: int, theirs: int) -> _Step:
        """From those who hold all so far to the holders of what follows. A worker that breaks its
        promise may appear late: it does not count."""
        staying = holding & theirs
        leaving = self.expand(holding ^ staying)
        # Steps are recognised by identity: mostly the next one is from all of them.
        return holding, theirs, theirs if staying == theirs else staying, leaving

    def find(self, sequence_hash: SequenceHash) -> _Holders | None:
        return self.locate(sequence_hash)[1]

    def locate(self, sequence_hash: SequenceHash) -> _Place:
        for generation in reversed(self.generations):
            if (holders := generation.get(sequence_hash)) is not None:
                return generation, holders
        return None, None

    def runs(
        self, hashes: Sequence[SequenceHash]
    ) -> Iterator[tuple[_Generation | None, _Holders | None, Sequence[SequenceHash]]]:
        """Cuts blocks into runs of the same place, None for those not known. A run is looked up
        only after the one before it was dealt with."""
        if len(hashes) > FEW_BLOCKS:
            # Mostly it is one run: then nothing is done block by block.
            in_generation, holders = self.locate(hashes[0])
            if in_generation is not None:
                found = list(map(in_generation.get, hashes))
                if found.count(holders) == len(found):
                    yield in_generation, holders, hashes
                    return
            elif all(each.keys().isdisjoint(hashes) for each in self.generations):
                yield None, None, hashes
                return
        start = 0
        while start < len(hashes):
            in_generation, holders = self.locate(hashes[start])
            end = start + 1
            while end < len(hashes):
                another_generation, another = self.locate(hashes[end])
                if another is not holders or another_generation is not in_generation:
                    break
                end += 1
            yield in_generation, holders, hashes[start:end]
            start = end


class PythonBlockIndex:
    """The BlockIndex of index.py, which documents its methods."""

    block_bytes: ClassVar[int] = 160
    """48 for its hash, and its place in a dict that is larger than what it holds, the more so when
    blocks come and go."""
    holders_bytes: ClassVar[int] = 640

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._models: dict[tuple[str, int], _Model] = {}
        self._workers: dict[InstanceId, _Worker] = {}
        self._entries = 0
        """Blocks in the maps, once for all holders, abandoned ones included."""
        self._abandoned = 0
        """Blocks in the maps whose last holder went."""
        self._holders_bytes = 0
        self._turn = 0
        """In each of them models begin a generation, when they need one."""
        self._turn_blocks = 0
        """Blocks that were new or were moved to the newest generation in this turn."""
        self.blocks = 0
        """Held now, once for every worker and tier."""
        self.evicted = 0
        """So many were evicted or not taken in since the beginning."""

    @property
    def used_bytes(self) -> int:
        return self._entries * self.block_bytes + self._holders_bytes

    def add(self, instance: InstanceId, model: str, block_size_tokens: int) -> None:
        assert instance not in self._workers
        of_model = self._models.setdefault((model, block_size_tokens), _Model())
        self._workers[instance] = _Worker(of_model, of_model.take_bit(instance))

    def remove(self, instance: InstanceId) -> None:
        worker = self._workers[instance]
        model = worker.model
        if model.workers == {instance}:
            self._forget_model(worker)
        else:
            self.clear(instance)
            model.give_back_bit(instance, worker.bit)
        del self._workers[instance]

    def store(
        self,
        instance: InstanceId,
        hashes: Sequence[SequenceHash],
        chains: Sequence[ChainStart] = (),
        tier: Tier = Tier.DEVICE,
    ) -> None:
        worker = self._workers[instance]
        if tier is not Tier.DEVICE:
            worker.model.has_lower_tiers = True
        start, before = 0, None
        for next_start, next_before in chains:
            self._store_chain(worker, hashes[start:next_start], before, tier)
            start, before = next_start, next_before
        self._store_chain(worker, hashes[start:] if start else hashes, before, tier)

    def discard(
        self, instance: InstanceId, hashes: Sequence[SequenceHash], tier: Tier = Tier.DEVICE
    ) -> None:
        worker = self._workers[instance]
        model = worker.model
        for generation, holders, run in model.runs(hashes):
            if generation is None or holders is None or not holders.masks[tier - 1] & worker.bit:
                worker.evicted = max(0, worker.evicted - len(run))
                continue
            if _toggled(worker, holders, tier) == _NOBODY:
                blocks = self._delete(generation, run)
                self._take_from(model, holders, blocks)
            else:
                blocks = self._toggle(worker, generation, holders, run, tier)
            worker.held -= blocks
            self.blocks -= blocks
        self._shrink(model)
        # Blocks that others still hold may need a set of holders that was not there.
        if self.used_bytes > self._max_bytes:
            self._make_room()

    def clear(self, instance: InstanceId) -> None:
        worker = self._workers[instance]
        model, others = worker.model, ~worker.bit
        self.blocks -= worker.held
        worker.held = worker.evicted = 0
        shared = [each for each in model.shared_sets if each.reach[-1] & worker.bit]
        for holders in (*worker.sets, *shared):
            self._forget_set(model, holders)
            device, host, disk = holders.masks
            holders.set_masks((device & others, host & others, disk & others))
            if holders.is_held:
                self._know_set(model, holders)
            else:
                self._abandoned += holders.blocks
        if 8 * self._abandoned > 7 * self._entries:
            self._drop_abandoned()

    def replace(
        self,
        instance: InstanceId,
        hashes: Sequence[SequenceHash],
        chains: Sequence[ChainStart] = (),
        lower_tiers: Sequence[BlocksStored] = (),
    ) -> None:
        self.clear(instance)
        self.store(instance, hashes, chains)
        for lower in lower_tiers:
            self.store(instance, lower.sequence_hashes, lower.chains, lower.tier)

    def overlap(
        self,
        model: str,
        block_size_tokens: int,
        prompt: Sequence[SequenceHash],
        slowest: Tier = Tier.DEVICE,
    ) -> dict[InstanceId, int]:
        of_model = self._models.get((model, block_size_tokens))
        if of_model is None or not prompt:
            return {}
        generations = of_model.generations
        find = generations[0].get if len(generations) == 1 else of_model.find
        first = find(prompt[0])
        if first is None or not first.is_held:
            return {}
        deepest = 0
        reach = slowest - 1
        depths: dict[InstanceId, int] = {}
        holders = first
        holding = first.reach[reach]
        low, end = 0, len(prompt)
        # Holders further on that were seen already, nearest last. Past the end nobody is one.
        ahead: list[tuple[int, _Holders | None]] = [(end, None)]
        if (last := find(prompt[-1])) is not None:
            ahead.append((end - 1, last))
        while holding:
            # `holders` hold block `low`. Where do others begin, and who? Mostly at the same block
            # as for the last prompt: then two looks tell.
            guess = holders.end
            if (
                low < guess < ahead[-1][0]
                and (low == guess - 1 or find(prompt[guess - 1]) is holders)
                and (following := find(prompt[guess])) is not holders
            ):
                high = guess
            else:
                high, following = ahead.pop()
                while high - low > 1:
                    middle = (low + high) // 2
                    between = find(prompt[middle])
                    if between is holders:
                        low = middle
                    else:
                        if between is not following:
                            ahead.append((high, following))
                            following = between
                        high = middle
                holders.end = high
            if following is not holders:
                theirs = following.reach[reach] if following is not None else 0
                step = holders.step
                if step is None or step[0] is not holding or step[1] is not theirs:
                    step = holders.step = of_model.step(holding, theirs)
                _, _, holding, leaving = step
                if leaving:
                    for instance in leaving:
                        depths[instance] = high
                    deepest = high
                if following is None:
                    break
                holders = following
            low = high
        if len(generations) > 1 or of_model.born != self._turn:
            self._renew(of_model, prompt, deepest)
        return depths

    def has_lower_tiers(self, model: str, block_size_tokens: int) -> bool:
        of_model = self._models.get((model, block_size_tokens))
        return of_model is not None and of_model.has_lower_tiers

    def held(self, instance: InstanceId, tier: Tier = Tier.DEVICE) -> frozenset[SequenceHash]:
        worker = self._workers[instance]
        return frozenset(
            sequence_hash
            for generation in worker.model.generations
            for sequence_hash, holders in generation.items()
            if holders.masks[tier - 1] & worker.bit
        )

    def held_blocks(self, instance: InstanceId) -> int:
        return self._workers[instance].held

    def evicted_blocks(self, instance: InstanceId) -> int:
        return self._workers[instance].evicted

    def _forget_model(self, last: _Worker) -> None:
        model = last.model
        self._entries -= sum(map(len, model.generations))
        sets = last.sets  # There is nobody to share any with.
        held_once = sum(holders.blocks for holders in sets)
        self._abandoned -= sum(map(len, model.generations)) - held_once
        self._holders_bytes -= sum(map(self._memory_bytes, sets))
        self.blocks -= last.held
        self._models = {key: of for key, of in self._models.items() if of is not model}

    def _store_chain(
        self,
        worker: _Worker,
        hashes: Sequence[SequenceHash],
        before: SequenceHash | None,
        tier: Tier,
    ) -> None:
        if not hashes:
            return
        model = worker.model
        generation: _Generation | None
        if before is None:
            generation = self._newest(model)
        else:
            generation, holders = model.locate(before)
            if generation is None or holders is None or not holders.reach[-1] & worker.bit:
                worker.evicted += len(hashes)
                self.evicted += len(hashes)
                return
        new_blocks = 0
        for known_in, holders, run in model.runs(hashes):
            if known_in is not None and holders is not None:
                if holders.is_held:
                    generation = known_in
                    if holders.masks[tier - 1] & worker.bit:
                        continue
                else:
                    # Left by its last holder. It is new again, and belongs at the end.
                    blocks = self._delete(known_in, run)
                    holders.blocks -= blocks
                    self._abandoned -= blocks
                    holders = None
            blocks = self._store_run(worker, generation, holders, run, tier)
            if holders is None:
                new_blocks += blocks
        self._count_turn(new_blocks)
        if self.used_bytes > self._max_bytes:
            self._make_room()

    def _store_run(
        self,
        worker: _Worker,
        generation: _Generation,
        before: _Holders | None,
        run: Sequence[SequenceHash],
        tier: Tier,
    ) -> int:
        """Adds a worker to the holders of these blocks, which are the same for all. How many
        blocks: some may be named twice."""
        if before is not None:
            blocks = self._toggle(worker, generation, before, run, tier)
        else:
            holders = self._holders(worker.model, _toggled(worker, None, tier))
            blocks_before = len(generation)
            _put(generation, run, holders)
            blocks = len(generation) - blocks_before
            holders.blocks += blocks
            self._entries += blocks
        worker.held += blocks
        self.blocks += blocks
        return blocks

    def _toggle(
        self,
        worker: _Worker,
        generation: _Generation,
        holders: _Holders,
        run: Sequence[SequenceHash],
        tier: Tier,
    ) -> int:
        """Adds a worker to the holders of these blocks, which are the same for all, or takes it
        from them, but not the last one. How many blocks: some may be named twice."""
        model = worker.model
        blocks = len(set(run))
        masks = _toggled(worker, holders, tier)
        if blocks == holders.blocks and masks not in model.known_sets:
            # These are all that they hold: then the blocks stay as they are.
            self._forget_set(model, holders)
            holders.set_masks(masks)
            self._know_set(model, holders)
        else:
            others = self._holders(model, masks, holders.end)
            _put(generation, run, others)
            others.blocks += blocks
            self._take_from(model, holders, blocks)
        return blocks

    def _renew(self, model: _Model, prompt: Sequence[SequenceHash], matched_blocks: int) -> None:
        """Moves what was matched to the newest generation."""
        newest = self._newest(model)
        if not matched_blocks or prompt[matched_blocks - 1] in newest:
            return
        blocks_before = len(newest)
        older = model.generations[-2::-1]
        for sequence_hash in prompt[:matched_blocks]:
            if sequence_hash in newest:
                continue
            for generation in older:
                if (holders := generation.pop(sequence_hash, None)) is not None:
                    newest[sequence_hash] = holders
                    break
        self._count_turn(len(newest) - blocks_before)
        self._shrink(model)

    def _newest(self, model: _Model) -> _Generation:
        """The generation of this turn."""
        generations = model.generations
        if model.born != self._turn:
            model.born = self._turn
            generations[:] = [generation for generation in generations if generation]
            if len(generations) > 2 * GENERATIONS:
                # What was the oldest is still evicted first.
                oldest = generations.pop(0)
                generations[0].update(oldest)
            generations.append({})
        return generations[-1]

    def _count_turn(self, blocks: int) -> None:
        """Goes on to the next turn when it is time. In a roomy index it never is."""
        self._turn_blocks += blocks
        if self._turn_blocks * self.block_bytes * GENERATIONS > self._max_bytes:
            self._turn_blocks = 0
            if 2 * self.used_bytes > self._max_bytes:
                self._turn += 1

    def _make_room(self) -> None:
        """Evicts until what is left fits."""
        while (excess_bytes := self.used_bytes - self._max_bytes) > 0 and self._entries:
            if 4 * self._abandoned > self._entries:
                self._drop_abandoned()
                continue
            model = self._least_recent()
            oldest = model.generations[0]
            if not oldest:
                del model.generations[0]
                continue
            blocks = min(len(oldest), -(-excess_bytes // self.block_bytes))
            gone = Counter(oldest.popitem()[1] for _ in range(blocks))
            self._entries -= blocks
            for holders, blocks in gone.items():
                self._count_evicted(model, holders, blocks)
            self._shrink(model)

    def _least_recent(self) -> _Model:
        """The model whose oldest generation is from before the others'."""
        return min(
            (model for model in self._models.values() if any(model.generations)),
            key=lambda model: model.born - len(model.generations),
        )

    def _count_evicted(self, model: _Model, holders: _Holders, blocks: int) -> None:
        if not holders.is_held:
            holders.blocks -= blocks
            self._abandoned -= blocks
            return
        for mask in holders.masks:
            for instance in model.expand(mask):
                worker = self._workers[instance]
                worker.held -= blocks
                worker.evicted += blocks
                self.blocks -= blocks
                self.evicted += blocks
        self._take_from(model, holders, blocks)

    def _drop_abandoned(self) -> None:
        for model in self._models.values():
            model.generations[:] = [
                {block: holders for block, holders in generation.items() if holders.is_held}
                for generation in model.generations
            ]
        self._entries -= self._abandoned
        self._abandoned = 0

    def _delete(self, generation: _Generation, run: Sequence[SequenceHash]) -> int:
        """How many there were."""
        blocks_before = len(generation)
        for sequence_hash in run:
            generation.pop(sequence_hash, None)
        blocks = blocks_before - len(generation)
        self._entries -= blocks
        return blocks

    def _shrink(self, model: _Model) -> None:
        """Gives memory back: dicts keep it until they grow."""
        for number, generation in enumerate(model.generations):
            if sys.getsizeof(generation) > MAX_TABLE_BYTES * len(generation) + SPARE_TABLE_BYTES:
                # A plain copy may be as large.
                model.generations[number] = dict(zip(generation, generation.values(), strict=True))

    def _holders(self, model: _Model, masks: _Masks, end: int = 0) -> _Holders:
        """The set with these masks; `end` is what it guesses when it is new."""
        if (holders := model.known_sets.get(masks)) is None:
            holders = _Holders(masks, end)
            self._know_set(model, holders)
        return holders

    def _take_from(self, model: _Model, holders: _Holders, blocks: int) -> None:
        """So many of a set's blocks are not its own any more."""
        holders.blocks -= blocks
        if not holders.blocks:
            self._forget_set(model, holders)

    def _sets_like(self, model: _Model, holders: _Holders) -> dict[_Holders, None]:
        """Where such a set is found when one of its workers is cleared."""
        bits = holders.reach[-1]
        if bits & (bits - 1):
            return model.shared_sets
        return self._workers[model.instance(bits)].sets

    def _memory_bytes(self, holders: _Holders) -> int:
        return self.holders_bytes + holders.masks_bytes

    def _know_set(self, model: _Model, holders: _Holders) -> None:
        self._sets_like(model, holders)[holders] = None
        model.known_sets.setdefault(holders.masks, holders)
        self._holders_bytes += self._memory_bytes(holders)

    def _forget_set(self, model: _Model, holders: _Holders) -> None:
        del self._sets_like(model, holders)[holders]
        if model.known_sets.get(holders.masks) is holders:
            del model.known_sets[holders.masks]
        self._holders_bytes -= self._memory_bytes(holders)

    def check_invariants(self) -> None:
        assert self.used_bytes <= self._max_bytes or not self._entries
        held = Counter[InstanceId]()
        entries = abandoned = holders_bytes = 0
        for model in self._models.values():
            assert model.workers
            blocks = Counter[_Holders]()
            for generation in model.generations:
                blocks.update(generation.values())
            entries += blocks.total()
            assert len(set().union(*model.generations)) == blocks.total(), "in two generations"
            known = {holders for holders in blocks if holders.is_held}
            own = [self._workers[instance].sets.keys() for instance in model.workers]
            assert known == set().union(model.shared_sets, *own)
            for holders in known:
                assert holders in self._sets_like(model, holders)
            for masks, holders in model.known_sets.items():
                assert holders in known
                assert holders.masks == masks
            for holders, count in blocks.items():
                assert holders.blocks == count
                if not holders.is_held:
                    abandoned += count
                    continue
                holders_bytes += self._memory_bytes(holders)
                for mask in holders.masks:
                    instances = model.expand(mask)
                    assert set(instances) <= model.workers
                    for instance in instances:
                        held[instance] += count
        assert (self._entries, self._abandoned) == (entries, abandoned)
        assert self._holders_bytes == holders_bytes
        assert self.blocks == held.total()
        for instance, worker in self._workers.items():
            assert worker.held == held[instance]
            assert worker.evicted >= 0


def _toggled(worker: _Worker, holders: _Holders | None, tier: Tier) -> _Masks:
    """Masks that have the worker in this tier where those have not, or the other way round."""
    masks = list(holders.masks if holders is not None else _NOBODY)
    masks[tier - 1] ^= worker.bit
    device, host, disk = masks
    return device, host, disk


def _put(generation: _Generation, run: Sequence[SequenceHash], holders: _Holders) -> None:
    """Gives blocks these holders."""
    for sequence_hash in run:
        generation[sequence_hash] = holders
