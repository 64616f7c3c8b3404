"""How one request survives the workers and routers that die under it.

A request is a series of attempts. Each gets the prompt and what earlier attempts produced, and is
asked only for the rest, so that the client's stream goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from libs.common.errors import NoLiveInstance, Overloaded, SwitchgearError

REFUSED_PAUSE_SECONDS = 0.25
"""How often a request that lost its worker asks whether another one takes it."""


@dataclass(frozen=True, slots=True)
class MigrationPolicy:
    """How much is done for one request."""

    max_attempts: int = 3
    """Workers or routers that may be lost or fail under it, the first included, before it fails."""
    patience_seconds: float = 5.0
    """How long a request that lost its worker waits for one that takes it, in all."""


@dataclass(slots=True)
class Attempts:
    """The tokens that a request has and what may be asked for next."""

    prompt: list[int]
    max_tokens: int
    min_tokens: int
    policy: MigrationPolicy
    is_worth_waiting: bool = False
    """Whether the caller's request is more than this, and something was spent on the rest of it."""
    produced: list[int] = field(default_factory=list)
    """Output tokens, of all attempts."""
    excluded_instance_ids: list[int] = field(default_factory=list)
    """Workers that failed the request."""
    failed: int = 0
    """Attempts that were lost."""
    waited_seconds: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        """The prompt of the next attempt."""
        return self.prompt + self.produced

    @property
    def remaining_tokens(self) -> int:
        """Output tokens that may still be asked for. At 0 the request is complete."""
        return self.max_tokens - len(self.produced)

    @property
    def remaining_min_tokens(self) -> int:
        return max(0, self.min_tokens - len(self.produced))

    def add(self, token_ids: Iterable[int]) -> None:
        """Takes tokens of the current attempt."""
        self.produced.extend(token_ids)

    def pause_after(self, error: SwitchgearError, failed_instance_id: int) -> float | None:
        """Counts a failure in. Seconds to wait before the next attempt, 0 after one that was lost;
        None gives up.

        A first attempt that finds no live instance, or full queues, fails at once: nothing was
        spent on it and the caller knows best when to come back.
        """
        if not error.is_retryable:
            return None
        if isinstance(error, (NoLiveInstance, Overloaded)):
            # Whoever was lost may be on its way back, the others may be full of its requests, and
            # a router that just started may not have found the workers yet.
            is_lightly_refused = not self.failed and not self.is_worth_waiting
            if is_lightly_refused or self.waited_seconds >= self.policy.patience_seconds:
                return None
            self.waited_seconds += REFUSED_PAUSE_SECONDS
            return REFUSED_PAUSE_SECONDS
        self.failed += 1
        if failed_instance_id and failed_instance_id not in self.excluded_instance_ids:
            self.excluded_instance_ids.append(failed_instance_id)
        return 0.0 if self.failed < self.policy.max_attempts else None
