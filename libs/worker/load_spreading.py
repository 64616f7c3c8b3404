"""Tells clients that get no outputs what others make of the worker's load, as it changes.

Routers that know nothing of each other must not all run to the same worker. While nothing changes
nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from libs.engine.interface import EngineLoad
from libs.worker.core.session import Session

MUCH_WITHIN_SECONDS = 0.005
"""How soon a change is told that matters for whether the worker gets the next request, along with
what follows it meanwhile: a message costs some 40 us here and there. After 1 ms it would meet a
request's first token in the router, which added 0.4 ms to that."""

ANY_WITHIN_SECONDS = 0.25
"""How soon any other is, such as of the blocks that decoding takes up."""


class Timers(Protocol):
    """What is used of an event loop."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> object:
        """Calls back once, after so many seconds."""


class LoadSpreading:
    """Looks at the load soon after something may have changed it."""

    def __init__(
        self,
        sessions: Collection[Session],
        read_load: Callable[[], EngineLoad],
        timers: Timers,
    ) -> None:
        """`sessions` are those of each moment."""
        self._sessions = sessions
        self._read_load = read_load
        self._timers = timers
        self._is_look_due = False
        self._is_slight_look_due = False

    def changed(self) -> None:
        """The load may be another one than before."""
        if not self._is_look_due:
            self._is_look_due = True
            self._timers.call_later(MUCH_WITHIN_SECONDS, self._tell_much)

    def _tell_much(self) -> None:
        self._is_look_due = False
        load = self._read_load()
        # All of them have to hear it, so no `any` that stops at the first.
        untold = [session for session in self._sessions if not session.load_changed(load)]
        if untold and not self._is_slight_look_due:
            self._is_slight_look_due = True
            self._timers.call_later(ANY_WITHIN_SECONDS, self._tell_any)

    def _tell_any(self) -> None:
        self._is_slight_look_due = False
        load = self._read_load()
        for session in self._sessions:
            session.load_changed(load, is_any_told=True)
