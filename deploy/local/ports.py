"""Choosing ports for processes that are yet to be started."""

import random
import socket

# Below the range that Linux takes outgoing connections' ports from (32768 up), so that a port is
# still free when the process that had it is restarted.
_FIRST_PORT, _LAST_PORT = 10_000, 32_000
_TRIES = 1_000


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as candidate:
        # Connections of an earlier server that linger in TIME_WAIT do not make a port taken.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((host, port))
        except OSError:
            return False
        return True


class FreePorts:
    """Hands out ports that nobody listens on, never the same one twice."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int:
        for _ in range(_TRIES):
            port = random.randint(_FIRST_PORT, _LAST_PORT)
            if port not in self._taken and is_free(port):
                self._taken.add(port)
                return port
        raise OSError(f"found no free port between {_FIRST_PORT} and {_LAST_PORT}")
