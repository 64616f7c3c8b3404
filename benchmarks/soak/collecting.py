"""Runs a service with a full garbage collection every few seconds, so that its memory shows what it
keeps and not what waits for the collector:
`python -m benchmarks.soak.collecting services.router ...`.

Services let the collector run rarely, as each run stops all streams. Calls leave cycles behind, of
grpc's and of the HTTP server's, which make their memory a sawtooth of some megabytes, as long as
100,000 requests: no slope of a part of it says anything.
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time

COLLECT_SECONDS = 5.0


def _collect_again_and_again() -> None:
    while True:
        time.sleep(COLLECT_SECONDS)
        gc.collect()


def main() -> None:
    module = sys.argv.pop(1)
    threading.Thread(target=_collect_again_and_again, name="collecting", daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
