"""Flow control of a session: how many messages may be on their way to a reader. Pure."""

from __future__ import annotations

from libs.common.errors import ProtocolViolation


class Credit:
    """What one writer has sent, and what its reader says it is done with."""

    def __init__(self, window_responses: int) -> None:
        """Raises ProtocolViolation for a window that nothing fits into."""
        if window_responses < 1:
            raise ProtocolViolation(f"window_responses must be at least 1, got {window_responses}")
        self._window = window_responses
        self._sent = 0
        self._consumed = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the next message must wait; what it will hold is merged meanwhile."""
        return self._sent - self._consumed >= self._window

    def sent(self) -> None:
        """One more message is on its way."""
        self._sent += 1

    def consumed(self, responses: int) -> None:
        """The reader is done with so many, in all. Raises ProtocolViolation for what can't be."""
        if not self._consumed <= responses <= self._sent:
            raise ProtocolViolation(
                f"consumed_responses must be between {self._consumed} and {self._sent}, "
                f"got {responses}"
            )
        self._consumed = responses
