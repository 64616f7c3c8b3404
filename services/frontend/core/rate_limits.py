"""How much one caller may do: token buckets and places, as plain data. The time is passed in.

A bucket fills evenly up to one minute's worth. It may be overdrawn: by a request whose true use
turned out larger than what was reserved, and by one that is larger than the bucket. The debt is
paid before anything else gets in, so the rate holds in the long run and nothing is refused for
ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BUSY_RETRY_SECONDS = 1.0
"""When to come back for a place; nobody knows when one gets free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """0 means none."""

    concurrent_requests: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


@dataclass(slots=True)
class Bucket:
    """What is left of a rate."""

    per_minute: int
    level: float
    """At `updated_at`. Negative is debt."""
    updated_at: float
    """In seconds, of any clock that does not go back."""

    def level_at(self, now: float) -> float:
        gained = max(0.0, now - self.updated_at) * self.per_minute / 60
        return min(float(self.per_minute), self.level + gained)

    def seconds_until(self, amount: float, now: float) -> float:
        """0 when `amount` can be taken now. An amount above the whole needs a full bucket."""
        missing = min(amount, self.per_minute) - self.level_at(now)
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Whether it is there or not. A negative amount gives back."""
        self.level = min(float(self.per_minute), self.level_at(now) - amount)
        self.updated_at = max(now, self.updated_at)

    def set_rate(self, per_minute: int, now: float) -> None:
        """Goes on with another rate, and with what was used."""
        used = self.per_minute - self.level_at(now)
        self.per_minute = per_minute
        self.level = per_minute - used
        self.updated_at = max(now, self.updated_at)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit was reached, and when to come back."""

    limited: Literal["concurrent requests", "requests", "tokens"]
    limit: int
    wanted: int
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Remaining:
    """What a caller may still do of one rate."""

    limit: int
    remaining: int
    reset_seconds: float
    """Until all of it is there again."""


class Usage:
    """What one caller has used of its limits."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.running = 0
        """Requests in progress."""
        self._concurrent = limits.concurrent_requests
        self._requests = _bucket(None, limits.requests_per_minute, now)
        self._tokens = _bucket(None, limits.tokens_per_minute, now)

    def set_limits(self, limits: Limits, now: float) -> None:
        """Other limits from now on."""
        self._concurrent = limits.concurrent_requests
        self._requests = _bucket(self._requests, limits.requests_per_minute, now)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, now)

    def admit(self, now: float) -> Refusal | None:
        """Takes a place and counts a request, or says why not. `leave` gives the place back."""
        if self._concurrent and self.running >= self._concurrent:
            return Refusal("concurrent requests", self._concurrent, 1, BUSY_RETRY_SECONDS)
        # Whoever is in debt is refused before work is spent on counting the prompt's tokens.
        if refusal := _refusal("tokens", self._tokens, 1, now):
            return refusal
        if refusal := _refusal("requests", self._requests, 1, now):
            return refusal
        if self._requests is not None:
            self._requests.take(1, now)
        self.running += 1
        return None

    def leave(self) -> None:
        """Ends a request that was admitted."""
        assert self.running > 0
        self.running -= 1

    def reserve(self, tokens: int, now: float) -> Refusal | None:
        """Takes tokens that a request may use, or says why not. `settle` corrects them later."""
        if refusal := _refusal("tokens", self._tokens, tokens, now):
            return refusal
        if self._tokens is not None:
            self._tokens.take(tokens, now)
        return None

    def settle(self, reserved: int, used: int, now: float) -> None:
        """Replaces what was reserved by what was used."""
        if self._tokens is not None:
            self._tokens.take(used - reserved, now)

    def remaining_requests(self, now: float) -> Remaining | None:
        """None without such a limit."""
        return _remaining(self._requests, now)

    def remaining_tokens(self, now: float) -> Remaining | None:
        """None without such a limit."""
        return _remaining(self._tokens, now)


def _bucket(bucket: Bucket | None, per_minute: int, now: float) -> Bucket | None:
    if not per_minute:
        return None
    if bucket is None:
        return Bucket(per_minute, per_minute, now)
    bucket.set_rate(per_minute, now)
    return bucket


def _refusal(
    limited: Literal["requests", "tokens"], bucket: Bucket | None, amount: int, now: float
) -> Refusal | None:
    if bucket is None or not (seconds := bucket.seconds_until(amount, now)):
        return None
    return Refusal(limited, bucket.per_minute, amount, seconds)


def _remaining(bucket: Bucket | None, now: float) -> Remaining | None:
    if bucket is None:
        return None
    return Remaining(
        bucket.per_minute,
        max(0, int(bucket.level_at(now))),
        bucket.seconds_until(bucket.per_minute, now),
    )
