"""The last batches that a worker has numbered, for readers that missed some. No I/O, clock or
logging in here."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

BATCH_COST_BYTES = 128
"""What a kept batch takes besides its own bytes, so that many small ones are bounded too."""


class RecentBatches:
    """A ring of serialised batches, bounded in bytes; the oldest make room for the newest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._batches: deque[bytes] = deque()
        self._first = 1
        """Number of the oldest batch here, or of the next one when there is none."""
        self._bytes = 0

    def append(self, data: bytes) -> None:
        """Takes the batch after the last one; the first of all has number 1."""
        self._batches.append(data)
        self._bytes += len(data) + BATCH_COST_BYTES
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._batches.popleft()) + BATCH_COST_BYTES
            self._first += 1

    def between(self, first: int, last: int) -> Sequence[bytes] | None:
        """Batches `first` to `last`, both included; None unless all of them are here."""
        if not self._first <= first <= last < self._first + len(self._batches):
            return None
        return list(islice(self._batches, first - self._first, last - self._first + 1))
