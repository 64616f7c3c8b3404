"""What one HTTP request carries along: its id, and what is counted about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs.common import logs
from libs.common.errors import SwitchgearError
from services.frontend.access import ANYONE, Caller
from services.frontend.pipeline import Pipeline, new_request_id
from services.frontend.watch import Connection

log = logs.get(__name__)

CONNECTION = "switchgear.connection"
"""Name of the extension by which the server tells what connection a request came on."""

_KEY = "switchgear.exchange"
_REFUSED = b"x-switchgear-refused"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/-]{1,128}")
_CLIENT_LEFT = 499
"""nginx's status for a client that did not wait. Only ever seen in metrics."""

_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/v1/embeddings": "embeddings",
    "/pooling": "pooling",
    "/v1/models": "models",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/health": "health",
    "/ready": "ready",
    "/live": "live",
    "/metrics": "metrics",
}


@dataclass(slots=True)
class Exchange:
    """One request and its answer."""

    request_id: str
    """The client's own, or a new one; not unique if the client says so."""
    headers: Mapping[bytes, bytes]
    """Names in lower case; of one that came several times the first value."""
    connection: Connection
    send: Send
    """The server's own. Layers between it and an answer look at its first message only, so the
    chunks of a stream need not pass through them."""
    model: str = ""
    """Name of the served model, once it is known."""
    status: int = _CLIENT_LEFT
    caller: Caller = ANYONE
    """Who asks, once that is known."""
    answer_id: str = ""
    """The name by which routers and workers know the request, once it has one."""
    failure: SwitchgearError | None = None
    """What the client was told in place of an answer, or of the rest of one."""

    @property
    def traceparent(self) -> str:
        """What the caller wants the request to be part of; empty for nothing."""
        return self.headers.get(b"traceparent", b"").decode("latin-1")


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that a request belongs to."""
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


class ExchangeRecorder:
    """Outermost: names every request, and counts every answer whoever made it."""

    def __init__(self, app: ASGIApp, pipeline: Pipeline) -> None:
        self._app = app
        self._pipeline = pipeline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # uvicorn is told to offer neither websockets nor lifespan.
            raise NotImplementedError(scope["type"])
        headers = dict(reversed(scope["headers"]))
        exchange = scope[_KEY] = Exchange(
            _request_id(headers), headers, scope["extensions"][CONNECTION], send
        )

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                request_id = exchange.request_id.encode()
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    *exchange.caller.rate_headers(),
                    *self._draining_headers(exchange.status),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            failure = exchange.failure
            if failure is not None and failure.http >= HTTPStatus.INTERNAL_SERVER_ERROR:
                log.warning(
                    "request failed",
                    request_id=exchange.request_id,
                    answer_id=exchange.answer_id,
                    model=exchange.model,
                    status=exchange.status,
                    reason=failure.reason,
                    error=failure.message,
                )
            self._pipeline.metrics.requests_of(
                exchange.model, _endpoint(scope["path"]), str(exchange.status)
            ).inc()

    def _draining_headers(self, status: int) -> list[tuple[bytes, bytes]]:
        """Who keeps the connection would be refused on it; and a proxy may ask another frontend
        for what is refused here, of which nothing was done."""
        if not self._pipeline.is_draining:
            return []
        refused = [(_REFUSED, b"draining")] if status == HTTPStatus.SERVICE_UNAVAILABLE else []
        return [(b"connection", b"close"), *refused]


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id")
    if given is not None and _SANE_ID.fullmatch(given):
        return given.decode()
    return new_request_id("req")


def _endpoint(path: str) -> str:
    for named in ("/v1/models", "/v1/responses"):
        if path.startswith(f"{named}/"):
            return _ENDPOINTS[named]
    return _ENDPOINTS.get(path, "other")
