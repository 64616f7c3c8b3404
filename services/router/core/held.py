"""Requests that no decode worker has room for. Pure.

At a full worker requests are admitted in their order, and all wait until the first one fits. Here
those that fit overtake, which keeps the room in use. Whoever is held back for long is sent in any
case: its worker then makes room for it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from services.router.core.workers import InstanceId

MAX_REQUESTS = 1_024
"""Held at once. More are sent to wait at a worker, which has its own bound."""

DEADLINE_PART = 1 / 2
"""Of the time until a request's deadline: what may pass before it is sent."""

LEASE_PART = 1 / 2
"""Likewise of the time that a prefill worker keeps a prompt's KV."""

Key = TypeVar("Key", bound=Hashable)


class _Entry(NamedTuple, Generic[Key]):
    arrived_at: float
    number: int
    key: Key
    tokens: int
    held_tokens: Mapping[InstanceId, int]
    least_tokens: int
    """That any worker has to find room for."""


def longest_wait_seconds(
    longest_seconds: float, left_seconds: float | None = None, kv_left_seconds: float | None = None
) -> float:
    """How long a request may be held; not at all if not above 0. `left_seconds`: until its
    deadline. `kv_left_seconds`: until its KV is dropped, if a prefill worker has computed its
    prompt."""
    seconds = longest_seconds
    if left_seconds is not None:
        seconds = min(seconds, left_seconds * DEADLINE_PART)
    if kv_left_seconds is not None:
        seconds = min(seconds, kv_left_seconds * LEASE_PART)
    return seconds


class HeldRequests(Generic[Key]):
    """By any key that the caller has for them, oldest first."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._entries: list[_Entry[Key]] = []
        self._by_key: dict[Key, _Entry[Key]] = {}
        self._added = 0

    def add(
        self, key: Key, arrived_at: float, tokens: int, held_tokens: Mapping[InstanceId, int]
    ) -> bool:
        """Holds a request that arrived at a time and whose KV is so many tokens, some of which
        workers hold; False when too many requests are held. A key is held once."""
        assert key not in self._by_key
        if len(self._entries) >= self._max_requests:
            return False
        self._added += 1
        least_tokens = tokens - max(held_tokens.values(), default=0)
        entry = _Entry(arrived_at, self._added, key, tokens, held_tokens, least_tokens)
        self._by_key[key] = entry
        insort(self._entries, entry)
        return True

    def remove(self, key: Key) -> None:
        """It is sent, or over. Unknown keys are ignored."""
        entry = self._by_key.pop(key, None)
        if entry is not None:
            self._entries.remove(entry)

    def to_try(self, free_tokens: Callable[[], Mapping[InstanceId, int]]) -> Iterator[Key]:
        """Those that had better not wait on, in order of arrival: some worker has room for them, or
        there is no worker to wait for.

        The room that workers have is asked for at first and after each that is told, which may have
        taken some. Requests may be added, which are not told, and removed meanwhile.
        """
        free = free_tokens()
        most = max(free.values(), default=-1)
        for entry in list(self._entries):
            if self._by_key.get(entry.key) is not entry:
                continue
            if not free or _fits(entry, free, most):
                yield entry.key
                free = free_tokens()
                most = max(free.values(), default=-1)

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        return len(self._entries)


def _fits(entry: _Entry[Key], free_tokens: Mapping[InstanceId, int], most: int) -> bool:
    """Whether any worker has room; `most` is what the roomiest has."""
    return entry.tokens <= most or (
        entry.least_tokens <= most
        and any(
            instance in free_tokens and entry.tokens - held <= free_tokens[instance]
            for instance, held in entry.held_tokens.items()
        )
    )
