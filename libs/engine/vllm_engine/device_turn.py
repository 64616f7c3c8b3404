"""One engine at a time is loaded on a GPU that several share.

vLLM takes what a GPU has less of after its trial run than before it for its own. An engine that
takes or gives back memory meanwhile leaves it no room for KV, or makes it fail.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SHARED_FOLDER = Path("/dev/shm")
"""Containers that share GPU memory have it in common; so have all processes of a host."""
TURN_SECONDS = 1800.0
"""For several large models, one after the other."""
_POLL_SECONDS = 0.1


class TurnNotGiven(Exception):
    """The engine is not wanted any more, or others have been loading for too long."""


def lock_file(environment: Mapping[str, str], folder: Path = SHARED_FOLDER) -> Path:
    """Where engines of this user that are shown the same GPUs meet."""
    devices = re.sub(r"[^\w,-]", "_", environment.get("CUDA_VISIBLE_DEVICES", "all"))
    return folder / f"switchgear-{os.getuid()}-gpu-{devices}.lock"


@contextmanager
def device_turn(
    path: Path, closing: threading.Event, timeout_seconds: float = TURN_SECONDS
) -> Iterator[None]:
    """Within it, no other engine that meets at `path` is loaded. The kernel ends a dead one's turn.

    Raises TurnNotGiven once `closing` is set or the time is up.
    """
    polls_left = round(timeout_seconds / _POLL_SECONDS)
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if polls_left <= 0:
                    raise TurnNotGiven(
                        f"others have held {path} for {timeout_seconds:.0f} s"
                    ) from None
                polls_left -= 1
                if closing.wait(_POLL_SECONDS):
                    raise TurnNotGiven("told to close") from None
        yield
