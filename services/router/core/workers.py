"""What the router knows of each worker: what it is, its load, and what was just sent to it. Pure.

The truth comes with every message of a worker, other routers' requests included. What this router
has sent since is booked on top, until the worker says that it has taken it in; so a burst of
requests between two steps does not all go to the same worker.
"""

from __future__ import annotations

from enum import Enum
from itertools import count
from typing import NamedTuple, NewType

from services.router.core.estimated_holdings import EstimatedHoldings

InstanceId = NewType("InstanceId", int)

UNKNOWN_ROOM_TOKENS = 1 << 62
"""Of a worker that has not said how many blocks it has: more than any has."""

_turns = count(1)


class Role(Enum):
    """Which legs a worker runs."""

    PREFILL = "prefill"
    DECODE = "decode"


class Load(NamedTuple):
    """A worker's load as it said. See switchgear.common.v1.WorkerLoad."""

    running_requests: int = 0
    waiting_requests: int = 0
    queued_prefill_tokens: int = 0
    active_kv_blocks: int = 0
    total_kv_blocks: int = 0


class Booking(NamedTuple):
    """Work that a worker has been given, or will be, and has not counted yet."""

    prefill_tokens: int
    """Prompt tokens it will have to compute."""
    kv_blocks: int
    """Blocks it will come to hold."""


class Worker:
    """One worker of one model."""

    __slots__ = (
        "_load",
        "active_kv_blocks",
        "block_size_tokens",
        "booked_kv_blocks",
        "booked_prefill_tokens",
        "booked_requests",
        "has_prompt_coming",
        "holdings",
        "instance_id",
        "is_available",
        "kv_room_tokens",
        "last_turn",
        "model",
        "name",
        "queued_prefill_tokens",
        "requests",
        "role",
        "transfer_backend",
    )

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        name: str,
        role: Role,
        model: str,
        block_size_tokens: int,
        transfer_backend: str = "",
    ) -> None:
        self.instance_id = instance_id
        self.name = name
        self.role = role
        self.model = model
        self.block_size_tokens = block_size_tokens
        self.transfer_backend = transfer_backend
        self.is_available = False
        """Whether it is registered and our session to it stands. A worker that died is out at once,
        not when its lease ends."""
        self.holdings: EstimatedHoldings | None = None
        """What it probably holds, when no KV events tell."""
        self.booked_requests = 0
        self.booked_prefill_tokens = 0
        self.booked_kv_blocks = 0
        self.last_turn = 0
        """Larger than that of any worker that was booked before it last was; 0 if it never was."""
        # Sums of what it said and what is booked. Kept, since every decision reads those of every
        # worker.
        self.requests = 0
        """In progress, waiting there, or on their way."""
        self.queued_prefill_tokens = 0
        """Prompt tokens ahead of a request that came now."""
        self.has_prompt_coming = False
        """Whether a prompt waits there for a step to begin, which a request that came now would be
        in, too: one that it has said to wait, or that is on its way. What it has said to run is in
        the step that has begun."""
        self.active_kv_blocks = 0
        """Blocks of sequences in progress, and of those on their way."""
        self.kv_room_tokens = UNKNOWN_ROOM_TOKENS
        """KV that the device has room for, used and free."""
        self._load = Load()

    @property
    def load(self) -> Load:
        """What it said last."""
        return self._load

    @load.setter
    def load(self, load: Load) -> None:
        self._load = load
        if load.total_kv_blocks:
            self.kv_room_tokens = load.total_kv_blocks * self.block_size_tokens
        self._add_up()

    @property
    def free_kv_tokens(self) -> int:
        """Room for KV that nothing takes: neither what it holds, nor what is on its way or waits
        there."""
        used = self.active_kv_blocks * self.block_size_tokens
        return self.kv_room_tokens - used - self._load.queued_prefill_tokens

    def book(self, booking: Booking) -> None:
        """Adds work that the load does not include yet."""
        self.booked_requests += 1
        self.booked_prefill_tokens += booking.prefill_tokens
        self.booked_kv_blocks += booking.kv_blocks
        self.last_turn = next(_turns)
        self._add_up()

    def unbook(self, booking: Booking) -> None:
        """Takes a booking back: the load includes it now, or it will never be."""
        self.booked_requests -= 1
        self.booked_prefill_tokens -= booking.prefill_tokens
        self.booked_kv_blocks -= booking.kv_blocks
        assert self.booked_requests >= 0
        self._add_up()

    def _add_up(self) -> None:
        load = self._load
        waiting = load.waiting_requests + self.booked_requests
        self.requests = load.running_requests + waiting
        self.queued_prefill_tokens = load.queued_prefill_tokens + self.booked_prefill_tokens
        self.active_kv_blocks = load.active_kv_blocks + self.booked_kv_blocks
        # An idle worker begins a step with the first request that comes.
        begun = 0 if load.running_requests else 1
        has_prompts = load.waiting_requests > 0 or self.booked_prefill_tokens > 0
        self.has_prompt_coming = has_prompts and waiting > begun
