"""Bodies of requests: received within bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import orjson
from fastapi import Request

from libs.common.errors import Overloaded
from services.frontend.config import FrontendSettings
from services.frontend.openai.errors import ApiError


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
        _check_types(request)
        body = await self._read(request)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ApiError(
                HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {error}", code="invalid_json"
            ) from None

    async def _read(self, request: Request) -> bytearray:
        announced = request.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async for piece in request.stream():
                    body += piece
                    self.buffered_bytes += len(piece)
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if self.buffered_bytes > self._max_buffered_bytes:
                        raise Overloaded("too many large requests at once", retry_after_seconds=1)
        except TimeoutError:
            raise ApiError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body did not arrive within {self._timeout_seconds:g} s",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
        finally:
            self.buffered_bytes -= len(body)
        return body

    def _too_large(self) -> ApiError:
        # The server reads on and drops the rest: were the connection closed instead, the client
        # would see a reset and not this.
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than {self._max_bytes} bytes",
            code="request_too_large",
        )


def _check_types(request: Request) -> None:
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type must be application/json, not {content_type[:100]!r}",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {encoding[:100]!r} is not supported; send the body as it is",
            code="unsupported_media_type",
        )
