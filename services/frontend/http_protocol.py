"""HTTP on one connection, with limits on what comes before the body.

The server reads headers of any size for any time; this refuses the large and the slow ones, in the
API's own shape of errors.
"""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from libs.common import logs
from services.frontend.openai.errors import ApiError
from services.frontend.openai.exchange import CONNECTION
from services.frontend.watch import Connection

log = logs.get(__name__)

TELL_SECONDS = 30.0
"""How often refusals are logged: whoever scans ports makes thousands of them."""

_MALFORMED = ApiError(
    HTTPStatus.BAD_REQUEST, "The request is not valid HTTP/1.1", code="invalid_http"
)


class _Refusals:
    """Logs one of a server's refusals every so often, and how many there were."""

    def __init__(self) -> None:
        self._untold = 0
        self._told_at_seconds = -math.inf

    def add(self, peer: str, error: ApiError, now_seconds: float) -> None:
        self._untold += 1
        if now_seconds - self._told_at_seconds >= TELL_SECONDS:
            log.warning(
                "request not read",
                peer=peer,
                code=error.code,
                error=error.message,
                refused=self._untold,
            )
            self._told_at_seconds, self._untold = now_seconds, 0


class HttpConfig(Config):
    """uvicorn's, the limits, and the refusals of all connections."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_header_bytes: int,
        header_timeout_seconds: float,
        **further: Any,
    ) -> None:
        super().__init__(app, **further)
        self.max_header_bytes = max_header_bytes
        self.header_timeout_seconds = header_timeout_seconds
        self.refusals = _Refusals()


class _HeadTooLarge(Exception):
    """The request line and headers are larger than allowed."""


class HeadHoldingTransport:
    """A connection's transport that writes an answer's head together with what follows it.

    In a write of its own a head costs another system call, and wakes the client up for nothing.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._holds_next = False
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def begin_answer(self) -> None:
        """What is written next is a head."""
        self._holds_next = True

    def write(self, data: bytes) -> None:
        if self._holds_next:
            self._holds_next = False
            self._held = data
            self._loop.call_soon(self._release)  # Nothing may follow for long.
            return
        if self._held:
            data = self._held + data
            self._held = b""
        self._transport.write(data)

    def close(self) -> None:
        self._release()
        self._transport.close()

    def _release(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""


class HttpProtocol(HttpToolsProtocol):
    """Reads a connection's requests. `head` is the request line with the headers."""

    config: HttpConfig

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._is_in_head = False
        self._framing_bytes = 0
        """Received since the last piece of a body, or since a head's end: an unfinished head, or
        what chunked bodies have around their pieces."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal = _MALFORMED
        self._connection = Connection()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._head_and_body = HeadHoldingTransport(transport, self.loop)  # type: ignore[arg-type]
        self.transport = self._head_and_body  # type: ignore[assignment]
        # Whoever connects and says nothing is like one that is kept alive and says nothing.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        super().connection_lost(exc)
        self._connection.lose()

    def data_received(self, data: bytes) -> None:
        self._framing_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._framing_bytes > self.config.max_header_bytes:
            self._refuse(self._large_head())
        elif self._is_in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.config.header_timeout_seconds, self._refuse_slow_head
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self._connection}  # type: ignore[dict-item]
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # Nobody reads what follows a chunked body.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        if self._framing_bytes > self.config.max_header_bytes:
            # The last piece may have been mostly body.
            size_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size_bytes > self.config.max_header_bytes:
                self._refusal = self._large_head()
                raise _HeadTooLarge  # The parser reports it as malformed.
        self._framing_bytes = 0
        self._head_and_body.begin_answer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.pipeline:
            # The end of a large body may have stopped the reading, which is what notices that a
            # client leaves.
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answers what can't be parsed, and closes."""
        self._refuse(self._refusal)

    def _large_head(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"Request line and headers are larger than {self.config.max_header_bytes} bytes",
            code="headers_too_large",
        )

    def _refuse_slow_head(self) -> None:
        self._head_timer = None
        self._refuse(
            ApiError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The headers did not arrive within {self.config.header_timeout_seconds:g} s",
                code="request_timeout",
            )
        )

    def _refuse(self, error: ApiError) -> None:
        self._stop_head_timer()
        peer = ":".join(map(str, self.client or ()))
        self.config.refusals.add(peer, error, self.loop.time())
        # Never into the middle of another answer on the same connection.
        if self.cycle is None or self.cycle.response_complete:
            status = HTTPStatus(error.status)
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b"
                % (status, status.phrase.encode(), len(error.body), error.body)
            )
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
