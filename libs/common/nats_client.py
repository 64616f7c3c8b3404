"""A NATS connection that outlives NATS: it connects in the background, again and again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.client import Client

from libs.common import logs
from libs.common.tasks import background

log = logs.get(__name__)

RECONNECT_SECONDS = 1


@asynccontextmanager
async def connecting(url: str, name: str) -> AsyncIterator[Client]:
    """A client that is connected as soon as NATS can be reached; `is_connected` tells.

    Publishing while it is not raises nats.errors.Error. Subscriptions made once it has been
    connected come back by themselves.
    """
    client = Client()

    async def on_error(error: Exception) -> None:
        log.debug("nats error", error=repr(error))

    async def on_disconnect() -> None:
        log.warning("nats disconnected", url=url)

    async def on_connect() -> None:
        log.info("nats connected", url=url)

    async def connect() -> None:
        await client.connect(
            url,
            name=name,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,
            connect_timeout=2,
            ping_interval=5,
            max_outstanding_pings=2,
            # What can't be sent now is stale later: readers notice the gap and take a snapshot.
            pending_size=0,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_connect,
        )
        await on_connect()

    async with background(connect()):
        try:
            yield client
        finally:
            if not client.is_closed:
                await client.close()


def connection_number(client: Client) -> int:
    """1, 2, 3, ... for the connections that a client had one after another; 0 while there is
    none."""
    return client.stats["reconnects"] + 1 if client.is_connected else 0
