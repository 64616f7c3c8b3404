"""Which worker served a session last. Pure."""

from __future__ import annotations

from collections import OrderedDict

from services.router.core.workers import InstanceId


class Sessions:
    """The sessions that were served most recently; the others have lost their worker's cache by
    then, more likely than not."""

    def __init__(self, *, ttl_seconds: float, max_sessions: int = 65_536) -> None:
        """`ttl_seconds` is how long after its last request a session has a worker."""
        self._ttl_seconds = ttl_seconds
        self._max_sessions = max_sessions
        self._served: OrderedDict[tuple[str, str], tuple[InstanceId, float]] = OrderedDict()
        """Workers by model and session id, with the time until which they are remembered: the
        first ends first."""

    def __len__(self) -> int:
        return len(self._served)

    def worker(self, model: str, session_id: str, now: float) -> InstanceId | None:
        """Who served it last; None for one that is not known, or for no session at all, which has
        an empty id. `now`, in seconds, never goes back."""
        if (found := self._served.get((model, session_id))) is None:
            return None
        instance, expires_at = found
        return instance if expires_at > now else None

    def served(self, model: str, session_id: str, instance: InstanceId, now: float) -> None:
        """A request of the session goes to a worker. An empty id is ignored."""
        if not session_id:
            return
        sessions = self._served
        sessions[model, session_id] = instance, now + self._ttl_seconds
        sessions.move_to_end((model, session_id))
        while len(sessions) > self._max_sessions or next(iter(sessions.values()))[1] <= now:
            sessions.popitem(last=False)
