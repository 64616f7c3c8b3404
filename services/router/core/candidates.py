"""The workers that could run a leg, with the terms that policies weigh. Pure.

Kept as columns: a decision among a thousand workers reads a few lists, and an object for a
candidate is made only when somebody looks at it. The columns are as of the decision, whatever
becomes of the workers' loads later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from services.router.core.workers import Booking, InstanceId, Role, Worker

STEP_TOKENS = 1024
"""What an engine step with prompts in it takes beyond their tokens, in tokens: with Dynamo's mocker
16.5 ms, where a token takes 0.015. A prompt that joins others in their step saves it."""


@dataclass(frozen=True, slots=True)
class TieredOverlap:
    """What a worker holds of a prompt when not all of it is on the device."""

    device_blocks: int
    host_blocks: int = 0
    """Leading blocks after those."""
    disk_blocks: int = 0
    """Leading blocks after all of those."""

    @property
    def blocks(self) -> int:
        return self.device_blocks + self.host_blocks + self.disk_blocks

    def brought_up(self, device_blocks: int) -> TieredOverlap:
        """With at least so many leading blocks on the device, from wherever they come."""
        if device_blocks <= self.device_blocks:
            return self
        held = max(device_blocks, self.device_blocks + self.host_blocks)
        return TieredOverlap(device_blocks, held - device_blocks, max(0, self.blocks - held))

    def missing_credit_blocks(self, host_credit: float, disk_credit: float) -> float:
        """By how much it saves less than as many blocks on the device, when a block in host memory
        or on disk, which has to be fetched, saves so much of computing it."""
        return (1 - host_credit) * self.host_blocks + (1 - disk_credit) * self.disk_blocks


Overlaps = Mapping[InstanceId, int | TieredOverlap]
"""Leading blocks of the prompt that each worker holds; those that hold none are left out. A plain
number is of blocks on the device."""


class Candidate(NamedTuple):
    """One worker's terms, in tokens but for blocks and requests."""

    worker: Worker
    overlap_blocks: int
    queued_prefill_tokens: int
    new_prefill_tokens: int
    new_kv_blocks: int
    decode_tokens: int
    cost: float
    requests: int = 0
    stalled_tokens: int = 0
    overflow_tokens: int = 0
    host_blocks: int = 0
    """The last ones of the overlap before those on disk, that it would load from host memory."""
    disk_blocks: int = 0

    @property
    def held_tokens(self) -> int:
        """Of the prompt, in whatever tier."""
        return self.overlap_blocks * self.worker.block_size_tokens

    @property
    def booking(self) -> Booking:
        """What choosing it adds to its load."""
        return Booking(self.new_prefill_tokens, self.new_kv_blocks)


class Candidates(Sequence[Candidate]):
    """At least one worker of one role. As a sequence: cheapest first, once `costs` are set."""

    def __init__(
        self,
        workers: Sequence[Worker],
        overlaps: Overlaps,
        *,
        prompt_tokens: int,
        block_size_tokens: int,
        is_prefill_local: bool,
        host_credit: float,
        disk_credit: float,
        session_worker: InstanceId | None = None,
    ) -> None:
        """`is_prefill_local`: whether whoever is chosen computes the prompt. Credits: as in
        policies.Weights."""
        self.workers = workers
        self.costs: Sequence[float] = [0.0] * len(workers)
        """In the order of `workers`."""
        self.is_decoding = workers[0].role is Role.DECODE
        """Whether whoever is chosen decodes."""
        self.session_worker = session_worker
        """Who served the request's session last."""
        self._prompt_tokens = prompt_tokens
        self.queued_tokens = [worker.queued_prefill_tokens for worker in workers]
        """Prompt tokens to compute before this prompt."""
        self.requests = [worker.requests for worker in workers]
        """In progress, waiting or on their way."""
        sizes = {worker.block_size_tokens for worker in workers}
        # Blocks in use by this prompt, if none of it is held.
        self._needed = {size: -(-prompt_tokens // size) for size in sizes}
        self.overlap_blocks = [0] * len(workers)
        """Leading blocks of the prompt held, in all tiers."""
        self._tiered: dict[int, TieredOverlap] = {}
        """By position, of workers that hold some of it in lower tiers."""
        if overlaps and block_size_tokens in sizes:
            self._read(overlaps, block_size_tokens)
        self._credits = host_credit, disk_credit
        self.new_tokens = self._new_tokens(block_size_tokens) if is_prefill_local else None
        """Prompt tokens that the worker would compute; None when they are computed elsewhere."""
        self.decode_tokens = self._decode_tokens()
        """KV that the worker would hold, this prompt's included."""
        self.stalled_tokens = self._stalled_tokens()
        """Prompt tokens to compute, and those of a step where no other prompt waits for one to
        begin, once for each request that stands still meanwhile."""
        self.overflow_tokens = [
            tokens - worker.kv_room_tokens if tokens > worker.kv_room_tokens else 0
            for tokens, worker in zip(self.decode_tokens, workers, strict=True)
        ]
        """KV for which there is no room, so that somebody must wait for others to end."""
        self._order: Sequence[int] = ()
        """Positions, cheapest first; empty until somebody asks."""

    def _read(self, overlaps: Overlaps, block_size_tokens: int) -> None:
        held = overlaps.get
        found = [
            held(worker.instance_id, 0) if worker.block_size_tokens == block_size_tokens else 0
            for worker in self.workers
        ]
        blocks = [
            one if isinstance(one, int) else self._all_blocks(position, one)
            for position, one in enumerate(found)
        ]
        # Whoever says more than there is holds all there is.
        full_blocks = self._prompt_tokens // block_size_tokens
        if max(blocks) > full_blocks:
            blocks = [min(one, full_blocks) for one in blocks]
        self.overlap_blocks = blocks

    def _all_blocks(self, position: int, overlap: TieredOverlap) -> int:
        self._tiered[position] = overlap
        return overlap.blocks

    def _new_tokens(self, block_size_tokens: int) -> list[int]:
        # The last token is always computed: its logits give the first output token.
        prompt = self._prompt_tokens
        new = [prompt - blocks * block_size_tokens or 1 for blocks in self.overlap_blocks]
        for position, overlap in self._tiered.items():
            loading = overlap.missing_credit_blocks(*self._credits) * block_size_tokens
            new[position] = round(new[position] + loading)
        return new

    def _on_device(self) -> list[int]:
        """Leading blocks that need no room on the device any more."""
        if not self._tiered:
            return self.overlap_blocks
        blocks = list(self.overlap_blocks)
        for position, overlap in self._tiered.items():
            blocks[position] = min(blocks[position], overlap.device_blocks)
        return blocks

    def _decode_tokens(self) -> list[int]:
        if not self.is_decoding:
            return [0] * len(self.workers)
        needed = self._needed
        if len(needed) == 1:
            [(size, blocks)] = needed.items()
            return [
                (worker.active_kv_blocks + blocks - held) * size
                for worker, held in zip(self.workers, self._on_device(), strict=True)
            ]
        return [
            (worker.active_kv_blocks + needed[worker.block_size_tokens] - held)
            * worker.block_size_tokens
            for worker, held in zip(self.workers, self._on_device(), strict=True)
        ]

    def _stalled_tokens(self) -> list[int]:
        if self.new_tokens is None or not self.is_decoding:
            return [0] * len(self.workers)
        return [
            (new if worker.has_prompt_coming else new + STEP_TOKENS) * requests
            for new, worker, requests in zip(
                self.new_tokens, self.workers, self.requests, strict=True
            )
        ]

    def has_room(self, position: int) -> bool:
        """Whether the KV would fit there now, beside all that the worker holds and that waits there
        for room. Nobody has more room than an idle worker."""
        return self._lacking_tokens(position) <= 0 or not self.workers[position].requests

    def nearest_to_room(self) -> tuple[Worker, int]:
        """Of workers without room the one that lacks the least, and how many tokens of KV that is,
        as of now."""
        lacking = list(map(self._lacking_tokens, range(len(self.workers))))
        least = min(lacking)
        return self.workers[lacking.index(least)], least

    def _lacking_tokens(self, position: int) -> int:
        worker = self.workers[position]
        ahead = self.decode_tokens[position] + worker.load.queued_prefill_tokens
        return ahead - worker.kv_room_tokens

    def held_tokens(self) -> dict[InstanceId, int]:
        """What of the prompt's KV each worker holds; those that hold none are left out."""
        return {
            worker.instance_id: blocks * worker.block_size_tokens
            for worker, blocks in zip(self.workers, self.overlap_blocks, strict=True)
            if blocks
        }

    def at(self, position: int) -> Candidate:
        """The candidate at a position of `workers`."""
        worker = self.workers[position]
        held = self.overlap_blocks[position]
        tiered = self._tiered.get(position)
        on_device = held if tiered is None else min(held, tiered.device_blocks)
        new_blocks = self._needed[worker.block_size_tokens] - on_device
        return Candidate(
            worker,
            held,
            self.queued_tokens[position],
            0 if self.new_tokens is None else self.new_tokens[position],
            new_blocks if self.is_decoding else 0,
            self.decode_tokens[position],
            self.costs[position],
            self.requests[position],
            self.stalled_tokens[position],
            self.overflow_tokens[position],
            0 if tiered is None else tiered.host_blocks,
            0 if tiered is None else tiered.disk_blocks,
        )

    def __len__(self) -> int:
        return len(self.workers)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> list[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | list[Candidate]:
        if not self._order:
            self._order = sorted(range(len(self.workers)), key=self.costs.__getitem__)
        if isinstance(index, slice):
            return [self.at(position) for position in self._order[index]]
        return self.at(self._order[index])
