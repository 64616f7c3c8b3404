"""Failures in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from http import HTTPStatus

import orjson

from libs.common.errors import (
    ContextTooLong,
    DeadlineExceeded,
    ModelNotFound,
    NoLiveInstance,
    Overloaded,
    SwitchgearError,
    WorkerLost,
)

DEFAULT_RETRY_SECONDS = 1.0

_CODES: dict[type[SwitchgearError], str] = {
    ContextTooLong: "context_length_exceeded",
    DeadlineExceeded: "timeout",
    ModelNotFound: "model_not_found",
    NoLiveInstance: "model_not_ready",
    Overloaded: "rate_limit_exceeded",
    WorkerLost: "worker_lost",
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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> bytes:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        elif self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )


def api_error_of(error: SwitchgearError) -> ApiError:
    """What the client hears of a failure inside. The text of a bug stays out of it."""
    if error.http == HTTPStatus.INTERNAL_SERVER_ERROR:
        return internal_error()
    headers = {}
    if error.http in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = error.retry_after_seconds or DEFAULT_RETRY_SECONDS
        headers["retry-after"] = str(math.ceil(seconds))
    return ApiError(
        error.http,
        error.message,
        param=error.param,
        code=_CODES.get(type(error), "invalid_value" if error.http < 500 else None),
        headers=headers,
    )


def internal_error() -> ApiError:
    """For bugs, whose text is in the log."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "The server had an error. Please retry.")
