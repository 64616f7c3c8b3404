"""The HTTP server. Several processes may share a port: the kernel spreads connections over them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from libs.common.errors import CannotListen
from services.frontend.config import FrontendSettings
from services.frontend.http_protocol import HttpConfig, HttpProtocol

BACKLOG_CONNECTIONS = 2048

KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep idle ones, so that we never close one that is just being used."""


SEND_BUFFER_BYTES = 128 << 10
"""What the kernel takes for a client that does not read; Linux doubles it. Left to itself it takes
4 MB, of this process's memory limit, where a token in an event takes 165 bytes and waiting in an
inbox 40. Enough for some 600 tokens, or for 10 Mbit/s over a way of 100 ms."""

LAST_ANSWERS_SECONDS = 2
"""For what is still being written at the end."""


class HttpServer(uvicorn.Server):
    """A server that leaves signals to the process's main, and can drain."""

    port: int

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop_listening(self) -> None:
        """New connections go to other processes on the port; open ones go on."""
        for server in getattr(self, "servers", ()):  # Set once it has started.
            server.close()


@asynccontextmanager
async def serving_http(app: ASGIApp, settings: FrontendSettings) -> AsyncIterator[HttpServer]:
    """Serves while the body runs; then cuts off. Raises CannotListen."""
    listener = _listen(settings.host, settings.http_port)
    config = HttpConfig(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",  # Its warnings are of single connections, and name no peer.
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_seconds=settings.header_timeout_seconds,
    )
    server = HttpServer(config)
    server.port = listener.getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield server
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await task


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind((host, port))
        # Connections are taken from now on, also before the server's first turn.
        listener.listen(BACKLOG_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise CannotListen("http_port", host, port, error) from error
    listener.setblocking(False)
    return listener
