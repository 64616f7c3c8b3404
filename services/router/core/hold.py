"""What is known of a time in which a request was held back. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.router.core.workers import Worker


class HoldEnd(Enum):
    """What became of a held request."""

    SENT = "sent"
    """A worker had room for it."""
    EXPIRED = "expired"
    """It was held for as long as may be, and sent to wait at a worker."""
    CANCELLED = "cancelled"
    """Its frontend did not want it any longer, or left."""
    FAILED = "failed"
    """Such as for want of any worker."""


@dataclass(slots=True, kw_only=True)
class Hold:
    """A time in which no decode worker had room for a request. Times are of any one clock."""

    began_at: float
    nearest: Worker
    """Of the workers without room the one that lacked the least, when it began."""
    lacking_tokens: int
    """KV that it had no room for."""
    is_prompt_computed: bool
    """Whether a prefill worker had computed the prompt by then."""
    ended_at: float | None = None
    """None while it lasts, as `end`."""
    end: HoldEnd | None = None

    def ended(self, now: float, end: HoldEnd) -> float:
        """It ends. Gives the seconds that it lasted."""
        self.ended_at, self.end = now, end
        return now - self.began_at

    def seconds(self, now: float) -> float:
        """How long it has lasted, or did."""
        return (now if self.ended_at is None else self.ended_at) - self.began_at
