"""Whether engines find cached what routing thought they hold. Pure.

Single requests differ for good reasons: a block was evicted, or stored a moment ago. What lasts has
a cause that somebody should see to, and which way the two differ hints at it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

MEMORY = 1 - 1 / 32
"""What remains of the past with every request: some 32 of them count."""

MIN_REQUESTS = 16
"""Fewer say nothing."""

RAISE_SHARE, CLEAR_SHARE = 0.5, 0.25
"""Shares of the cached tokens that differ. Between the two it stays as it was."""

MAIN_SHARE = 0.9
"""A cause that nearly all of the difference comes with is taken for the reason."""


class Reason(Enum):
    """The likely cause of a lasting disagreement."""

    BLOCK_SIZE = "block_size"
    """Frontends hash prompts by another block size than the worker's."""
    TOKENIZER_OR_TEMPLATE = "tokenizer_or_template"
    """The worker's model files are not those of the model's other workers."""
    ADAPTER = "adapter"
    """Only requests with an adapter differ: it is hashed in another way here and there."""
    STORED_EVENTS_MISSING = "stored_events_missing"
    """The engine has more than the index knows."""
    REMOVED_EVENTS_MISSING = "removed_events_missing"
    """The index knows more than the engine has, or it evicts before requests get to run."""
    ESTIMATE_WRONG = "estimate_wrong"
    """The worker has no KV events, and what it was given is a bad guess at what it holds."""


class Outcome(NamedTuple):
    """One prompt that an engine has computed."""

    predicted_tokens: int
    """That the worker was thought to hold."""
    reported_tokens: int
    """That its engine found cached."""
    block_size_tokens: int
    """The worker's. A difference of one block is none: engines compute the last token anew, and
    some its block with it."""
    is_block_size_right: bool = True
    """Whether the request was hashed by the same."""
    has_adapter: bool = False
    has_events: bool = True
    """Whether the prediction comes from KV events."""
    has_common_files: bool = True
    """Whether the worker's model files are those of the others."""

    @property
    def excess_tokens(self) -> int:
        """What the engine had beyond the prediction; below zero, what it lacked."""
        difference = self.reported_tokens - self.predicted_tokens
        return difference if abs(difference) > self.block_size_tokens else 0


class Agreement:
    """One worker's outcomes, the recent ones counting most."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        """Why predictions are wrong for long; None while they are good, or not known to be bad."""
        self._requests = 0
        self._cached_tokens = 0.0
        self._more_tokens = 0.0
        self._less_tokens = 0.0
        self._of_cause: dict[Reason, float] = {}

    def add(self, outcome: Outcome) -> None:
        """Takes an outcome in. Prompts of which nothing is cached, nor thought to be, say
        nothing."""
        cached = max(outcome.predicted_tokens, outcome.reported_tokens)
        if cached <= outcome.block_size_tokens:
            return
        excess = outcome.excess_tokens
        self._requests += 1
        self._cached_tokens = self._cached_tokens * MEMORY + cached
        self._more_tokens = self._more_tokens * MEMORY + max(0, excess)
        self._less_tokens = self._less_tokens * MEMORY + max(0, -excess)
        for cause in self._of_cause:
            self._of_cause[cause] *= MEMORY
        if excess:
            for cause, is_given in (
                (Reason.BLOCK_SIZE, not outcome.is_block_size_right),
                (Reason.TOKENIZER_OR_TEMPLATE, not outcome.has_common_files),
                (Reason.ADAPTER, outcome.has_adapter),
                (Reason.ESTIMATE_WRONG, not outcome.has_events),
            ):
                past = self._of_cause.get(cause, 0.0)
                self._of_cause[cause] = past + (abs(excess) if is_given else 0)
        if self._requests >= MIN_REQUESTS:
            self.reason = self._judge()

    def _judge(self) -> Reason | None:
        difference = self._more_tokens + self._less_tokens
        limit = RAISE_SHARE if self.reason is None else CLEAR_SHARE
        if difference <= limit * self._cached_tokens:
            return None
        for cause, tokens in self._of_cause.items():
            if tokens >= MAIN_SHARE * difference:
                return cause
        if self._more_tokens >= self._less_tokens:
            return Reason.STORED_EVENTS_MISSING
        return Reason.REMOVED_EVENTS_MISSING
