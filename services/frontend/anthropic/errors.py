"""Failures in Anthropic's shape: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from starlette.responses import Response
from starlette.types import Scope

from services.frontend.openai import errors
from services.frontend.openai.errors import ApiError
from services.frontend.openai.exchange import exchange_of

PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
"""The API's own, on which all errors are in its shape."""

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


def error_body(error: ApiError, request_id: str | None) -> bytes:
    """The body of an error's answer, and the data of its event."""
    is_ours = error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    kind = _TYPES.get(error.status, "api_error" if is_ours else "invalid_request_error")
    fields = {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }
    return orjson.dumps(fields)


def error_response(error: ApiError, scope: Scope) -> Response:
    """The answer to a request, in the shape of the API that it is of."""
    if scope["path"] not in PATHS:
        return errors.error_response(error)
    body = error_body(error, exchange_of(scope).request_id)
    return Response(body, error.status, headers=error.headers, media_type="application/json")
