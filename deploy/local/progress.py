"""A line every so often while something takes long, for who reads no terminal."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PERIOD_SECONDS = 15.0


@contextmanager
def told(tell: Callable[[str], object], what: Callable[[], str]) -> Iterator[None]:
    """Tells from a thread what the body is at, and for how long it has been, until it ends."""
    began_at = time.monotonic()
    ended = threading.Event()

    def repeat() -> None:
        # Whoever can no longer be told is no reason to stop.
        with suppress(OSError):
            while not ended.wait(PERIOD_SECONDS):
                tell(f"{what()} ({time.monotonic() - began_at:.0f} s)")

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
