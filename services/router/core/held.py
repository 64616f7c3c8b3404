"""Requests that no decode worker has room for. Pure.

At a full worker requests are admitted in their order, and all wait until the first one fits. Here
those that fit overtake, which keeps the room in use. Whoever is held back for long is sent in any
case: its worker then makes room for it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

MAX_REQUESTS = 1_024
"""Held at once. More are sent to wait at a worker, which has its own bound."""

LEASE_PART = 2 / 3
"""Of the time that a prefill worker keeps a prompt's KV: what may pass before it is sent."""

Key = TypeVar("Key", bound=Hashable)


class _Entry(NamedTuple, Generic[Key]):
    arrived_at: float
    number: int
    tokens: int
    key: Key


class HeldRequests(Generic[Key]):
    """By any key that the caller has for them, oldest first."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._entries: list[_Entry[Key]] = []
        self._by_key: dict[Key, _Entry[Key]] = {}
        self._added = 0

    def add(self, key: Key, arrived_at: float, tokens: int) -> bool:
        """Holds a request that arrived at a time, and whose KV takes so many tokens where most of
        it is held; False when too many are held. A key is held once."""
        assert key not in self._by_key
        if len(self._entries) >= self._max_requests:
            return False
        self._added += 1
        entry = self._by_key[key] = _Entry(arrived_at, self._added, tokens, key)
        insort(self._entries, entry)
        return True

    def remove(self, key: Key) -> None:
        """It is sent, or over. Unknown keys are ignored."""
        entry = self._by_key.pop(key, None)
        if entry is not None:
            self._entries.remove(entry)

    def fitting(self, free_tokens: int) -> list[Key]:
        """Those that may fit into so much room, in order of arrival."""
        return [entry.key for entry in self._entries if entry.tokens <= free_tokens]

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        return len(self._entries)
