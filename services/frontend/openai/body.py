"""Bodies of requests: received within bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from fastapi import Request
from starlette.types import Receive

from libs.common.errors import Overloaded
from services.frontend.config import FrontendSettings
from services.frontend.openai.errors import ApiError
from services.frontend.openai.exchange import exchange_of
from services.frontend.watch import ClientLeft, Watch

_JSON = b"application/json"


class BodyReader:
    """Reads bodies; knows how much of them is being held."""

    def __init__(self, settings: FrontendSettings) -> None:
        self._max_bytes = settings.max_body_bytes
        self._max_buffered_bytes = settings.max_buffered_body_bytes
        self._timeout_seconds = settings.body_timeout_seconds
        self.buffered_bytes = 0
        """Of bodies that are being received."""

    async def json_of(self, request: Request) -> object:
        """The body's JSON. Raises ApiError when it is too large, too slow, or not JSON, and
        Overloaded when too much of others' bodies is on its way."""
        headers = exchange_of(request.scope).headers
        _check_types(headers)
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            raise self._too_large()
        deadline = asyncio.get_running_loop().time() + self._timeout_seconds
        with Watch(deadline, late=self._too_late):
            body = await self._read(request.receive)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ApiError(
                HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {error}", code="invalid_json"
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        pieces: list[bytes] = []
        size_bytes = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                piece: bytes = message["body"]
                pieces.append(piece)
                size_bytes += len(piece)
                self.buffered_bytes += len(piece)
                if size_bytes > self._max_bytes:
                    raise self._too_large()
                if self.buffered_bytes > self._max_buffered_bytes:
                    raise Overloaded("too many large requests at once", retry_after_seconds=1)
                if not message["more_body"]:
                    return piece if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.buffered_bytes -= size_bytes

    def _too_late(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body did not arrive within {self._timeout_seconds:g} s",
            code="request_timeout",
            headers={"connection": "close"},
        )

    def _too_large(self) -> ApiError:
        # The server reads on and drops the rest: were the connection closed instead, the client
        # would see a reset and not this.
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than {self._max_bytes} bytes",
            code="request_too_large",
        )


def _check_types(headers: Mapping[bytes, bytes]) -> None:
    content_type = headers.get(b"content-type", _JSON)
    if content_type != _JSON and content_type.partition(b";")[0].strip().lower() != _JSON:
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type must be application/json, not {_shown(content_type)}",
            code="unsupported_media_type",
        )
    encoding = headers.get(b"content-encoding", b"")
    if encoding.strip().lower() not in (b"identity", b""):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {_shown(encoding)} is not supported; send the body as it is",
            code="unsupported_media_type",
        )


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))
