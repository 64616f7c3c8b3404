"""Ending a request's work from outside: at a deadline, or when its client has left.

Without a task, and without a coroutine for each: every request is watched, and asyncio.timeout with
a task that waits for the client's leaving cost a tenth of a short request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from libs.common.errors import DeadlineExceeded


class ClientLeft(Exception):
    """The client closed its connection before its answer was complete."""


class Connection:
    """A client's connection: tells those who work for it when it is lost."""

    __slots__ = ("_watches", "is_lost")

    def __init__(self) -> None:
        self.is_lost = False
        self._watches: set[Watch] = set()

    def lose(self) -> None:
        """The client has left."""
        self.is_lost = True
        for watch in self._watches:
            watch.end(ClientLeft())

    def add(self, watch: Watch) -> None:
        self._watches.add(watch)

    def discard(self, watch: Watch) -> None:
        self._watches.discard(watch)


def _late() -> Exception:
    return DeadlineExceeded("the request took longer than it was allowed to")


class Watch:
    """Runs its body until it ends, or is ended: with `late` at a deadline of the event loop's time,
    and with ClientLeft when the connection is lost.

    As with asyncio.timeout the body's task is cancelled where it waits, and the error raised when
    it has left the body.
    """

    __slots__ = ("_cancellations", "_connection", "_deadline", "_error", "_late", "_task", "_timer")

    def __init__(
        self,
        deadline: float,
        connection: Connection | None = None,
        *,
        late: Callable[[], Exception] = _late,
    ) -> None:
        self._deadline = deadline
        self._connection = connection
        self._late = late
        self._error: Exception | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancellations = task.cancelling()
        if self._connection is not None:
            if self._connection.is_lost:
                raise ClientLeft
            self._connection.add(self)
        self._timer = asyncio.get_running_loop().call_at(self._deadline, self._on_deadline)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._connection is not None:
            self._connection.discard(self)
        if self._error is not None:
            is_ours = self._task.uncancel() <= self._cancellations
            if is_ours and isinstance(error, asyncio.CancelledError):
                raise self._error from None

    def end(self, error: Exception) -> None:
        """Ends the body with this error, unless it is being ended already."""
        if self._error is None:
            self._error = error
            self._task.cancel()

    def _on_deadline(self) -> None:
        self.end(self._late())
