"""Failures in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from http import HTTPStatus

import orjson
from starlette.responses import Response

from libs.common.errors import (
    ContextTooLong,
    DeadlineExceeded,
    ModelNotAllowed,
    ModelNotFound,
    NoLiveInstance,
    Overloaded,
    RequestsLimited,
    ResponsesUnavailable,
    RoutingNotAllowed,
    SwitchgearError,
    TaskNotSupported,
    TokensLimited,
    Unauthenticated,
    WorkerLost,
)

DEFAULT_RETRY_SECONDS = 1.0

_CODES: dict[type[SwitchgearError], str] = {
    ContextTooLong: "context_length_exceeded",
    DeadlineExceeded: "timeout",
    # OpenAI has the same code for a model that does not exist and one that is not for this key.
    ModelNotAllowed: "model_not_found",
    ModelNotFound: "model_not_found",
    NoLiveInstance: "no_live_instance",
    Overloaded: "rate_limit_exceeded",
    RequestsLimited: "rate_limit_exceeded",
    ResponsesUnavailable: "responses_unavailable",
    RoutingNotAllowed: "routing_not_allowed",
    TaskNotSupported: "unsupported_model",
    TokensLimited: "rate_limit_exceeded",
    Unauthenticated: "invalid_api_key",
    WorkerLost: "worker_lost",
}


# OpenAI names the limit that was reached where it has the error's type.
_TYPES: dict[type[SwitchgearError], str] = {
    RequestsLimited: "requests",
    TokensLimited: "tokens",
}


class ApiError(Exception):
    """A failure as the client gets it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        kind: str = "",
    ) -> None:
        """`kind` is the error's `type`; empty takes the one that goes with the status."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.kind = kind or _kind_of(status)

    @property
    def body(self) -> bytes:
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )


def _kind_of(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    return "invalid_request_error"


def api_error_of(error: SwitchgearError) -> ApiError:
    """What the client hears of a failure inside. The text of a bug stays out of it."""
    if error.http == HTTPStatus.INTERNAL_SERVER_ERROR:
        return internal_error()
    headers = {}
    if error.http in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = error.retry_after_seconds or DEFAULT_RETRY_SECONDS
        headers["retry-after"] = str(math.ceil(seconds))
    if error.http == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return ApiError(
        error.http,
        error.message,
        param=error.param,
        code=_CODES.get(type(error), "invalid_value" if error.http < 500 else None),
        headers=headers,
        kind=_TYPES.get(type(error), ""),
    )


def error_response(error: ApiError) -> Response:
    return Response(error.body, error.status, headers=error.headers, media_type="application/json")


def internal_error() -> ApiError:
    """For bugs, whose text is in the log."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "The server had an error. Please retry.")
