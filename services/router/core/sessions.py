"""Which worker served a session last. Pure."""

from __future__ import annotations

from collections import OrderedDict

from services.router.core.workers import InstanceId


class Sessions:
    """The sessions that were served most recently; the others have lost their worker's cache by
    then, more likely than not."""

    def __init__(self, max_sessions: int = 65_536) -> None:
        self._max_sessions = max_sessions
        self._workers: OrderedDict[str, InstanceId] = OrderedDict()

    def worker(self, session_id: str) -> InstanceId | None:
        """Who served it last; None for one that is not known, or for no session at all, which has
        an empty id."""
        return self._workers.get(session_id)

    def served(self, session_id: str, instance: InstanceId) -> None:
        """A request of the session goes to a worker. An empty id is ignored."""
        if not session_id:
            return
        self._workers[session_id] = instance
        self._workers.move_to_end(session_id)
        if len(self._workers) > self._max_sessions:
            self._workers.popitem(last=False)
