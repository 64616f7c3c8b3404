"""Saying once that something is away, now and then that it still is, and that it is back. Pure."""

from __future__ import annotations

import math

REPEAT_SECONDS = 30.0


class Outage:
    """Of one peer that several depend on, each of which finds out by itself."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()
        self._began_at = 0.0
        self._said_at = -math.inf

    @property
    def waiting(self) -> list[str]:
        """Who found the peer away and has not found it again."""
        return sorted(self._waiting)

    def failed(self, who: str, now: float) -> bool:
        """Whether to say so: at first, and again after so many seconds."""
        if not self._waiting:
            self._began_at, self._said_at = now, -math.inf
        self._waiting.add(who)
        if now - self._said_at < REPEAT_SECONDS:
            return False
        self._said_at = now
        return True

    def worked(self, who: str, now: float) -> float | None:
        """The outage's seconds when this one is the last that finds the peer again, else None."""
        if who not in self._waiting:
            return None
        self._waiting.discard(who)
        return None if self._waiting else now - self._began_at
