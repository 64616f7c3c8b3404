"""Sending less often when there is much to send.

A gRPC message costs some hundred microseconds of CPU on its way, whatever is in it. A sender that
has just sent waits a moment for more to go along; one that has not sends at once. So a request that
comes alone is not delayed, and under load messages grow while their number stays.

For requests, not for tokens: those are merged by whoever is behind, and merge less when they are
held back to arrive in step.
"""

from __future__ import annotations

import asyncio

BUSY_SECONDS = 0.004
"""What follows the last message sooner than this waits."""

GATHER_SECONDS = 0.002
"""How long it waits."""


class Gathering:
    """One sender's rhythm."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time() - BUSY_SECONDS

    async def before_sending(self) -> None:
        """Returns when it is time to put together what there is."""
        if self._loop.time() - self._sent_at < BUSY_SECONDS:
            await asyncio.sleep(GATHER_SECONDS)

    def sent(self) -> None:
        """A message has gone."""
        self._sent_at = self._loop.time()
