"""A collector in a process of its own that takes spans and looks at none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

METHOD = ("opentelemetry.proto.collector.trace.v1.TraceService", "Export")


@contextmanager
def discarding() -> Iterator[str]:
    """Gives its endpoint."""
    command = [sys.executable, "-m", "benchmarks.tracing.collector"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def serve() -> None:
    """Prints the port, and serves until killed."""
    service, method = METHOD
    # Requests are left as bytes, and an empty answer is the right one.
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda request, context: b""
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    serve()
