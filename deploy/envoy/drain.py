"""Lets an Envoy that is to stop finish what it relays: `python -m deploy.envoy.drain`."""

from __future__ import annotations

import time
import urllib.request

ADMIN_URL = "http://127.0.0.1:9901"
LIMIT_SECONDS = 30.0
"""What still runs then is cut off."""

_POLL_SECONDS = 0.2
_ASK_SECONDS = 2.0


def drain() -> None:
    """Returns when no request is on its way, or at the limit.

    Meanwhile clients are told to connect anew elsewhere: by `connection: close`, or GOAWAY. Raises
    OSError when there is no Envoy to ask.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    _ask("/healthcheck/fail", method="POST")
    _ask("/drain_listeners?graceful&skip_exit", method="POST")
    while _active_requests() > 0 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _active_requests() -> int:
    lines = _ask("/stats?filter=^http.edge.downstream_rq_active$").splitlines()
    return sum(int(line.rpartition(":")[2]) for line in lines)


def _ask(path: str, method: str = "GET") -> str:
    request = urllib.request.Request(f"{ADMIN_URL}{path}", method=method)
    with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as response:
        body: bytes = response.read()
    return body.decode()


if __name__ == "__main__":
    drain()
