"""Tells clients that get no outputs what others make of the worker's load, as it changes.

Routers that know nothing of each other must not all run to the same worker. While nothing changes
nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from libs.engine.interface import EngineLoad
from libs.worker.core.session import Session

SETTLE_SECONDS = 0.001
"""After a change: what comes along with it is told at once with it, and outputs go first."""

LOAD_INTERVAL_SECONDS = 0.005
"""Between one look at the load and the next: a message costs some 40 us here and there."""

SLIGHT_LOAD_INTERVAL_SECONDS = 0.25
"""How soon a change is told that does not matter for whether the worker gets the next request, such
as the blocks that decoding takes up."""


class Timers(Protocol):
    """What is used of an event loop."""

    def time(self) -> float:
        """In seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> object:
        """Calls back once, at that time."""


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
        self._looked_at = float("-inf")
        self._is_look_due = False
        self._is_slight_look_due = False

    def changed(self) -> None:
        """The load may be another one than before."""
        if not self._is_look_due:
            self._is_look_due = True
            settled_at = self._timers.time() + SETTLE_SECONDS
            next_at = self._looked_at + LOAD_INTERVAL_SECONDS
            self._timers.call_at(max(settled_at, next_at), self._tell_much)

    def _tell_much(self) -> None:
        self._is_look_due = False
        self._looked_at = self._timers.time()
        load = self._read_load()
        # All of them have to hear it, so no `any` that stops at the first.
        untold = [session for session in self._sessions if not session.load_changed(load)]
        if untold and not self._is_slight_look_due:
            self._is_slight_look_due = True
            at = self._looked_at + SLIGHT_LOAD_INTERVAL_SECONDS
            self._timers.call_at(at, self._tell_any)

    def _tell_any(self) -> None:
        self._is_slight_look_due = False
        load = self._read_load()
        for session in self._sessions:
            session.load_changed(load, is_any_told=True)
