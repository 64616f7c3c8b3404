"""Comments in a stream that has nothing else to say, so that no proxy takes it for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

COMMENT = b": keep-alive\n\n"


class KeepAlive:
    """Calls `send` whenever nothing was sent for some time, while the body runs.

    It costs a timer for each stream and nothing for a chunk. Whoever sends chunks reports them
    with `sent`, and awaits `settled` before the first one, which a comment may be ahead of.
    """

    def __init__(self, seconds: float, send: Callable[[], Awaitable[None]]) -> None:
        """0 seconds never call it."""
        self._seconds = seconds
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> KeepAlive:
        self._arm()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def sent(self) -> None:
        """Something was sent just now."""
        self._sent_at = self._loop.time()

    async def settled(self) -> None:
        """Waits for a comment that is being sent. Raises what sending it raised."""
        if self._sending is not None:
            await self._sending

    def _arm(self) -> None:
        if self._seconds:
            self._timer = self._loop.call_at(self._sent_at + self._seconds, self._on_time)

    def _on_time(self) -> None:
        if self._loop.time() >= self._sent_at + self._seconds:
            # One that a slow client has not taken yet is enough.
            if self._sending is None or self._sending.done():
                self._sending = asyncio.create_task(self._comment(), name="keep alive")
            self.sent()
        self._arm()

    async def _comment(self) -> None:
        await self._send()
