"""A NATS connection that outlives NATS: it connects in the background, again and again."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from nats.aio.client import Client
from nats.errors import Error

from libs.common import logs
from libs.common.credentials import ServerAccess
from libs.common.errors import CredentialsRefused
from libs.common.mistrust import FailedConnections, mistrust_of
from libs.common.tasks import background

log = logs.get(__name__)

RECONNECT_SECONDS = 1
FIRST_ANSWER_SECONDS = 5
"""How long a start waits to hear whether NATS lets us in."""

CLOSE_SECONDS = 1

_NO_TLS = "the server offers no TLS"
_UNREADABLE = "credentials not read"
_REFUSALS = (_NO_TLS, _UNREADABLE, "authorization violation")
"""The last one as NATS words it, in either case."""


class _Client(Client):
    """Reads certificates, password and token whenever it connects."""

    def __init__(self, url: str, access: ServerAccess) -> None:
        super().__init__()
        self._access = access
        self._wants_tls = url.startswith("tls:")
        self._has_tls = False

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """Asked for when a connection goes over to TLS."""
        self._has_tls = True
        with _as_nats_errors():
            return self._access.certificates.client_context()

    def _connect_command(self) -> bytes:
        """What is sent first. Asks for password and token, each time."""
        # The server says whether it goes on with TLS, or who pretends to be it.
        if self._wants_tls and not self._has_tls:
            raise Error(_NO_TLS)
        with _as_nats_errors():
            return super()._connect_command()

    async def _process_connect_init(self) -> None:
        self._has_tls = False
        try:
            await super()._process_connect_init()
        except BaseException:
            # Another attempt opens another connection, and this one would stay open.
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]
            raise

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # A connection whose handshake failed is waited for in vain: what would tell of its end was
        # told to TLS.
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await super()._close(status, do_cbs)
        except TimeoutError:
            self._status = status


@contextmanager
def _as_nats_errors() -> Iterator[None]:
    """Those are what the client goes on after."""
    try:
        yield
    except ValueError as error:
        raise Error(f"{_UNREADABLE}: {error}") from error


class _News:
    """What a client hears of its connections: it is logged, and the first answer kept for a start
    that waits for it."""

    def __init__(self, url: str, access: ServerAccess) -> None:
        self._url = url
        self._certificates = access.certificates
        self._failed = FailedConnections(access.certificates, ["nats"])
        self.is_first_attempt = True
        self.first_answer: asyncio.Future[CredentialsRefused | None] = (
            asyncio.get_running_loop().create_future()
        )
        """None when NATS let us in, or is away."""

    def answered(self, refusal: CredentialsRefused | None) -> None:
        if not self.first_answer.done():
            self.first_answer.set_result(refusal)

    async def on_error(self, error: Exception) -> None:
        if isinstance(error, ssl.SSLError):
            self._failed.found("nats", self._url, mistrust_of(error, self._certificates))
        refusal = _as_refusal(self._url, error)
        if refusal is None:
            level = logging.DEBUG if self.first_answer.done() else logging.WARNING
            log.log(level, "nats unavailable", url=self._url, error=repr(error))
            self.answered(None)
        elif self.is_first_attempt and not self.first_answer.done():
            # Ends the attempts to connect; what was opened for them is closed with the client.
            raise refusal
        else:
            log.error("nats refuses", error=str(refusal))
            self.answered(refusal)

    async def on_disconnect(self) -> None:
        log.warning("nats disconnected", url=self._url)

    async def on_connect(self) -> None:
        log.info("nats connected", url=self._url)
        self.answered(None)


@asynccontextmanager
async def connecting(
    url: str, name: str, access: ServerAccess | None = None
) -> AsyncIterator[Client]:
    """A client that is connected as soon as NATS can be reached; `is_connected` tells.

    Publishing while it is not raises nats.errors.Error. Subscriptions made once it has been
    connected come back by themselves. Raises CredentialsRefused when NATS answers at once and does
    not let us in.
    """
    access = access or ServerAccess()
    client, news = _Client(url, access), _News(url, access)
    async with background(_connect(client, url, name, access, news)):
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_SECONDS):
                    if (refusal := await news.first_answer) is not None:
                        raise refusal
            yield client
        finally:
            if not client.is_closed:
                await client.close()


async def _connect(client: Client, url: str, name: str, access: ServerAccess, news: _News) -> None:
    """Returns once it is connected, or refused at once. It connects again by itself."""
    try:
        await client.connect(
            url,
            name=name,
            user=access.username or None,
            password=access.password if access.password_file else None,
            token=access.token if access.token_file else None,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,
            connect_timeout=2,
            ping_interval=5,
            max_outstanding_pings=2,
            # What can't be sent now is stale later: readers notice the gap and take a snapshot.
            pending_size=0,
            error_cb=news.on_error,
            disconnected_cb=news.on_disconnect,
            reconnected_cb=news.on_connect,
        )
    except CredentialsRefused as refusal:
        news.answered(refusal)
    else:
        news.is_first_attempt = False
        # A connection that ends without a word, for want of a certificate, returns as well.
        if client.is_connected:
            await news.on_connect()


def _as_refusal(url: str, error: Exception) -> CredentialsRefused | None:
    """None when it is another failure, such as that NATS is away."""
    text = str(error).lower()
    if isinstance(error, ssl.SSLError) or any(refusal.lower() in text for refusal in _REFUSALS):
        return CredentialsRefused(f"NATS at {url} can't be used with these credentials: {error}")
    return None


def connection_number(client: Client) -> int:
    """1, 2, 3, ... for the connections that a client had one after another; 0 while there is
    none."""
    return client.stats["reconnects"] + 1 if client.is_connected else 0
