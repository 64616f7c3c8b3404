"""One request on its way through the engine."""

from __future__ import annotations

from enum import Enum, auto

from libs.engine.interface import EngineHash, EngineRequest, KvSession


class Phase(Enum):
    WAITING = auto()
    """For room. Has no blocks."""
    PULLING = auto()
    """Has blocks for its whole prompt, whose KV is on its way from another engine."""
    LOADING = auto()
    """Has blocks for what is on its way from the host tier."""
    PREFILLING = auto()
    DECODING = auto()
    KEPT = auto()
    """A prefill leg's prompt, computed, until it is pulled."""
    ENDED = auto()


class Sequence:
    """A request's tokens and blocks. Changed by the scheduler only.

    tokens:  |--- prompt ---|--- produced ---|
    blocks:  |-- hashes[:held_blocks], cached --|-- private_blocks --|
    """

    __slots__ = (
        "admitted_at",
        "arrival",
        "cached_tokens",
        "computed_tokens",
        "expires_at",
        "hashes",
        "held_blocks",
        "is_started",
        "kv_session",
        "length_limit_tokens",
        "loaded_at",
        "loading",
        "pending_prefill_tokens",
        "phase",
        "private_blocks",
        "request",
        "room_tokens",
        "seed",
        "state",
        "stop_token_ids",
        "submitted_at",
        "tokens",
        "transfer_seconds",
        "transferred_tokens",
        "was_admitted",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        arrival: int,
        submitted_at: float,
        length_limit_tokens: int,
        stop_token_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.submitted_at = submitted_at
        self.length_limit_tokens = length_limit_tokens
        """Prompt and output together."""
        self.stop_token_ids = stop_token_ids
        self.seed = seed
        self.phase = Phase.WAITING
        self.tokens = list(request.prompt)
        self.hashes: list[int] = []
        """Sequence hashes of the tokens' full blocks, as far as they were needed yet."""
        self.held_blocks = 0
        self.private_blocks = 0
        self.computed_tokens = 0
        """Leading tokens whose KV is in the blocks. Not kept up to date while decoding, when it
        is all tokens but the last."""
        self.room_tokens = 0
        """While decoding: slots left in the private block."""
        self.state = 0
        """While decoding: of the token source, after all tokens."""
        self.pending_prefill_tokens = 0
        self.is_started = False
        self.was_admitted = False
        """It got blocks once; it may have lost them again."""
        self.admitted_at = 0.0
        """When that was for the first time."""
        self.transfer_seconds = 0.0
        """How long its KV was being pulled."""
        self.loading: list[EngineHash] = []
        """While loading: what is read from the host tier, following the held blocks."""
        self.loaded_at = 0.0
        """While loading: when that will be there."""
        self.cached_tokens = 0
        self.transferred_tokens = 0
        self.kv_session: KvSession | None = request.kv_session
        """None once it is known to be of no use."""
        self.expires_at = 0.0
        """While kept."""
