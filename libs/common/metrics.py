"""Prometheus metrics over HTTP, for services that have no HTTP server of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server


@contextmanager
def serving_metrics(host: str, port: int) -> Iterator[int]:
    """Serves /metrics from a thread while the body runs; gives the port."""
    server, thread = start_http_server(port, addr=host)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
