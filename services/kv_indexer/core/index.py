"""Which workers hold which KV blocks. No I/O, clock or logging in here.

Theory of operation. A sequence hash names a block and all before it, so no tree is needed: each
model has a flat map from sequence hash to holders, and each worker has the set of what it holds.
They mirror each other. Holders are a bit mask, one bit for each worker of the model: most blocks
have one holder, whose mask all of them share.

Workers promise that holding a block implies holding all before it. Along a prompt the holders thus
only ever become fewer, so wherever two positions have the same holders, so has everything between
them, and the depth of each match is found by bisecting instead of walking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from libs.common.kv_events import InstanceId, SequenceHash


class _Holder:
    """One worker's share of the index."""

    __slots__ = ("bit", "held", "model")

    def __init__(self, model: _Model, bit: int) -> None:
        self.model = model
        self.bit = bit
        self.held: set[SequenceHash] = set()


class _Model:
    """What is held of one model, at one block size."""

    __slots__ = ("free_bits", "holders", "workers")

    def __init__(self) -> None:
        self.holders: dict[SequenceHash, int] = {}
        self.workers: dict[int, InstanceId] = {}
        """By bit."""
        self.free_bits: list[int] = []
        """Of workers that left, for those to come."""

    def take_bit(self, instance: InstanceId) -> int:
        bit = self.free_bits.pop() if self.free_bits else 1 << len(self.workers)
        self.workers[bit] = instance
        return bit

    def give_back_bit(self, bit: int) -> None:
        del self.workers[bit]
        self.free_bits.append(bit)


class BlockIndex:
    """Prefix overlap by sequence hash, of many models.

    Bounded: a block counts once for each worker that holds it, and beyond `max_blocks` no more are
    taken in. What is in stays right then, since a worker's share loses only its newest blocks.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._models: dict[tuple[str, int], _Model] = {}
        self._workers: dict[InstanceId, _Holder] = {}
        self.blocks = 0
        """Held now, over all workers."""

    def add(self, instance: InstanceId, model: str, block_size_tokens: int) -> None:
        """Adds a worker that holds nothing yet. It must not be in the index."""
        assert instance not in self._workers
        of_model = self._models.setdefault((model, block_size_tokens), _Model())
        self._workers[instance] = _Holder(of_model, of_model.take_bit(instance))

    def remove(self, instance: InstanceId) -> None:
        """Forgets a worker and what it holds."""
        self.clear(instance)
        worker = self._workers.pop(instance)
        worker.model.give_back_bit(worker.bit)
        if not worker.model.workers:
            self._models = {key: of for key, of in self._models.items() if of is not worker.model}

    def store(self, instance: InstanceId, hashes: Iterable[SequenceHash]) -> bool:
        """Adds blocks, none before the one it follows; those held already change nothing.

        False when there was no room for all: the rest, and all that follows from it, is not in
        the index. Nothing more may be stored for the worker then until it is cleared or replaced.
        """
        worker = self._workers[instance]
        held, holders = worker.held, worker.model.holders
        room = self._max_blocks - self.blocks
        # Neighbours mostly have the same holders: let them share one mask object.
        others, mask = 0, worker.bit
        added = 0
        for sequence_hash in hashes:
            if sequence_hash in held:
                continue
            if added == room:
                self.blocks += added
                return False
            added += 1
            before = holders.get(sequence_hash, 0)
            if before != others:
                others, mask = before, before | worker.bit
            holders[sequence_hash] = mask
            held.add(sequence_hash)
        self.blocks += added
        return True

    def discard(self, instance: InstanceId, hashes: Iterable[SequenceHash]) -> None:
        """Removes blocks; those not held change nothing."""
        worker = self._workers[instance]
        held, holders = worker.held, worker.model.holders
        before, others = worker.bit, 0
        for sequence_hash in hashes:
            if sequence_hash not in held:
                continue
            held.remove(sequence_hash)
            self.blocks -= 1
            mask = holders[sequence_hash]
            if mask != before:
                before, others = mask, mask ^ worker.bit
            if others:
                holders[sequence_hash] = others
            else:
                del holders[sequence_hash]

    def clear(self, instance: InstanceId) -> None:
        """Removes all of a worker's blocks."""
        self.discard(instance, tuple(self._workers[instance].held))

    def replace(self, instance: InstanceId, hashes: Sequence[SequenceHash]) -> bool:
        """Makes a worker hold exactly these blocks, none before the one it follows. Result as of
        `store`."""
        self.discard(instance, self._workers[instance].held.difference(hashes))
        return self.store(instance, hashes)

    def overlap(
        self, model: str, block_size_tokens: int, prompt: Sequence[SequenceHash]
    ) -> dict[InstanceId, int]:
        """Leading blocks of the prompt that each worker holds, without workers that hold none.

        Looks at a logarithmic number of the prompt's blocks for each different depth, so the
        prompt may be any sequence with cheap indexing.
        """
        of_model = self._models.get((model, block_size_tokens))
        if of_model is None or not prompt:
            return {}
        find, workers = of_model.holders.get, of_model.workers
        depths: dict[InstanceId, int] = {}
        # Stretches [low, high) of the prompt whose holders may become fewer somewhere inside;
        # `holders` hold block `low`, `staying` of them block `high`. Past the end nobody does.
        stretches = [(0, find(prompt[0], 0), len(prompt), 0)]
        while stretches:
            low, holders, high, staying = stretches.pop()
            leaving = holders & ~staying
            if not leaving:
                continue
            if high - low == 1:
                while leaving:
                    bit = leaving & -leaving
                    depths[workers[bit]] = high
                    leaving ^= bit
                continue
            middle = (low + high) // 2
            # A worker that breaks its promise may appear late in a prompt: ignored.
            between = find(prompt[middle], 0) & holders
            stretches.append((low, holders, middle, between))
            stretches.append((middle, between, high, staying))
        return depths

    def held(self, instance: InstanceId) -> frozenset[SequenceHash]:
        """A copy of what a worker holds."""
        return frozenset(self._workers[instance].held)

    def held_blocks(self, instance: InstanceId) -> int:
        """How many blocks a worker holds."""
        return len(self._workers[instance].held)

    def check_invariants(self) -> None:
        """For tests: raises AssertionError when what is kept contradicts itself."""
        assert self.blocks == sum(len(worker.held) for worker in self._workers.values())
        assert self.blocks <= self._max_blocks
        for model in self._models.values():
            workers = [worker for worker in self._workers.values() if worker.model is model]
            assert {worker.bit for worker in workers} == set(model.workers)
            assert workers
            assert set(model.holders) == set().union(*(worker.held for worker in workers))
            for sequence_hash, mask in model.holders.items():
                assert mask == sum(w.bit for w in workers if sequence_hash in w.held)
