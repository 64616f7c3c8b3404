"""Handing out what arrives in rounds, with a rest after each half as long as it took.

To hand an output out costs fixed work for every request that gets some: a task's wake-up, and the
system call that writes a chunk. With few requests a round is short and has no rest: tokens go out
as they come. With many the rest lets more tokens gather for each request: chunks grow, and a third
of the event loop's time stays for requests that begin.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")

SHORT_ROUND_SECONDS = 0.001
"""No rest follows a round that took less."""

LONGEST_REST_SECONDS = 0.05

REST = 0.5
"""Of the time that a round took. With 128 streams 1.0 delays tokens for no gain; with 512 streams
0.0 loses a third of the throughput."""


def rest_seconds(took_seconds: float) -> float:
    """How long to let things gather after a round that took so long."""
    if took_seconds < SHORT_ROUND_SECONDS:
        return 0.0
    return min(REST * took_seconds, LONGEST_REST_SECONDS)


class Rounds(Generic[ItemT]):
    """What has arrived and was not handed out. One writer, one reader.

    It has no bound of its own: the writer's peer sends no more messages than it has credit for, and
    gets that for what was handed out. Messages have a limit of size.
    """

    def __init__(self) -> None:
        self._arrived: list[ItemT] = []
        self._news = asyncio.Event()
        self._is_over = False
        self._error: Exception | None = None

    def put(self, item: ItemT) -> None:
        """Adds to the next round."""
        self._arrived.append(item)
        self._news.set()

    def end(self, error: Exception | None = None) -> None:
        """Nothing follows what has arrived; the reader gets the error after it."""
        self._is_over = True
        self._error = error
        self._news.set()

    async def each(self) -> AsyncIterator[list[ItemT]]:
        """All that has arrived since the last round, once for each round, until the end.

        Raises the error that ended it.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._news.wait()
            self._news.clear()
            began = loop.time()
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield arrived
            if self._is_over and not self._arrived:
                if self._error is not None:
                    raise self._error
                return
            await asyncio.sleep(0)  # Whom the round woke has their turn, and counts with it.
            if rest := rest_seconds(loop.time() - began):
                await asyncio.sleep(rest)
