"""Prometheus metrics over HTTP, for services that have no HTTP server of their own; and those that
every service has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product

from prometheus_client import Counter, Gauge, start_http_server

from libs.common.errors import CannotListen

ASYNCIO_TASKS = Gauge("switchgear_asyncio_tasks", "Tasks of the event loop that have not ended.")


def count_from_zero(counter: Counter, *values: Iterable[str]) -> None:
    """Makes the series of all combinations of labels' values, of each label in turn.

    Prometheus' `rate` sees no step in a series that begins with it: what happens for the first time
    would be on no dashboard.
    """
    for combination in product(*values):
        counter.labels(*combination)


@contextmanager
def serving_metrics(host: str, port: int) -> Iterator[int]:
    """Serves /metrics from a thread while the body runs in an event loop; gives the port. Raises
    CannotListen."""
    loop = asyncio.get_running_loop()
    # Counted when somebody asks, from the metrics server's thread: `all_tasks` is made for that.
    ASYNCIO_TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
    try:
        server, thread = start_http_server(port, addr=host)
    except OSError as error:
        raise CannotListen("metrics_port", host, port, error) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
