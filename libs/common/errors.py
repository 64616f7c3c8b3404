"""Failures that callers can act on. One class holds a failure's gRPC code, HTTP status and reason,
so that nothing can drift between hops. Any other exception is a bug.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

from grpc import StatusCode


class SwitchgearError(Exception):
    """A failure the caller can act on.

    The message is for people and names what was wrong; `param` names the request field in the
    caller's own terms, where there is one.
    """

    code: ClassVar[StatusCode] = StatusCode.INTERNAL
    http: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    reason: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False
    """Whether the same request may succeed later, or on another worker."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InternalError(SwitchgearError):
    """A bug on the other side of a hop. Its text stays in the logs."""


class InvalidRequest(SwitchgearError):
    """A parameter is missing, malformed or out of range."""

    code, http, reason = StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "INVALID_REQUEST"


class ContextTooLong(InvalidRequest):
    """Prompt plus output exceed the model's context."""

    reason = "CONTEXT_TOO_LONG"


class TaskNotSupported(InvalidRequest):
    """The model does not do what was asked: it embeds and does not generate, or the reverse."""

    reason = "TASK_NOT_SUPPORTED"


class Unauthenticated(SwitchgearError):
    """An API key is asked for, and none or an unknown one was given."""

    code, http, reason = (
        StatusCode.UNAUTHENTICATED,
        HTTPStatus.UNAUTHORIZED,
        "UNAUTHENTICATED",
    )


class ModelNotAllowed(SwitchgearError):
    """The API key is good, but not for this model."""

    code, http, reason = (
        StatusCode.PERMISSION_DENIED,
        HTTPStatus.FORBIDDEN,
        "MODEL_NOT_ALLOWED",
    )


class RoutingNotAllowed(SwitchgearError):
    """The API key is good, but its requests may not say how they are routed."""

    code, http, reason = (
        StatusCode.PERMISSION_DENIED,
        HTTPStatus.FORBIDDEN,
        "ROUTING_NOT_ALLOWED",
    )


class CallerNotAllowed(SwitchgearError):
    """The caller's certificate is good, but of a service that has no business here."""

    code, http, reason = (
        StatusCode.PERMISSION_DENIED,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "CALLER_NOT_ALLOWED",
    )


class CredentialsRefused(SwitchgearError):
    """etcd or NATS does not let this process in, or is not who its certificate should say. Ends a
    process that starts; one that runs tries again."""

    reason = "CREDENTIALS_REFUSED"


class RequestsLimited(SwitchgearError):
    """The API key's limit on requests, in a minute or at the same time, is reached."""

    code, http, reason = (
        StatusCode.RESOURCE_EXHAUSTED,
        HTTPStatus.TOO_MANY_REQUESTS,
        "REQUESTS_LIMITED",
    )
    is_retryable = True


class TokensLimited(SwitchgearError):
    """The API key's limit on tokens in a minute is reached."""

    code, http, reason = (
        StatusCode.RESOURCE_EXHAUSTED,
        HTTPStatus.TOO_MANY_REQUESTS,
        "TOKENS_LIMITED",
    )
    is_retryable = True


class ModelNotFound(SwitchgearError):
    """Nobody serves a model of that name."""

    code, http, reason = StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND, "MODEL_NOT_FOUND"


class Overloaded(SwitchgearError):
    """Queues are full; nothing was spent on the request."""

    code, http, reason = (
        StatusCode.RESOURCE_EXHAUSTED,
        HTTPStatus.TOO_MANY_REQUESTS,
        "OVERLOADED",
    )
    is_retryable = True


class NoLiveInstance(SwitchgearError):
    """The model is known, but who is needed to serve it is not there just now."""

    code, http, reason = (
        StatusCode.UNAVAILABLE,
        HTTPStatus.SERVICE_UNAVAILABLE,
        "NO_LIVE_INSTANCE",
    )
    is_retryable = True


class WorkerLost(SwitchgearError):
    """The instance that had the request died, or drained it, before it was done."""

    code, http, reason = StatusCode.ABORTED, HTTPStatus.SERVICE_UNAVAILABLE, "WORKER_LOST"
    is_retryable = True


class TransferFailed(SwitchgearError):
    """KV could not be pulled. The decode worker computes the prompt itself."""

    code, http, reason = StatusCode.ABORTED, HTTPStatus.SERVICE_UNAVAILABLE, "TRANSFER_FAILED"
    is_retryable = True


class ResponsesUnavailable(SwitchgearError):
    """Where responses are kept can't be reached, or has too much to do."""

    code, http, reason = (
        StatusCode.UNAVAILABLE,
        HTTPStatus.SERVICE_UNAVAILABLE,
        "RESPONSES_UNAVAILABLE",
    )
    is_retryable = True


class DeadlineExceeded(SwitchgearError):
    """The time that the caller allowed is over."""

    code, http, reason = (
        StatusCode.DEADLINE_EXCEEDED,
        HTTPStatus.GATEWAY_TIMEOUT,
        "DEADLINE_EXCEEDED",
    )


class KvBatchesGone(SwitchgearError):
    """A worker no longer has the KV event batches that a reader missed, or they are too many: a
    snapshot will do."""

    code, http, reason = (
        StatusCode.OUT_OF_RANGE,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "KV_BATCHES_GONE",
    )


class ProtocolViolation(SwitchgearError):
    """A peer service broke the session protocol. Ends the session, not the process."""

    code, http, reason = (
        StatusCode.INVALID_ARGUMENT,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "PROTOCOL_VIOLATION",
    )


class CannotListen(OSError):
    """A port is taken, or an address is not this machine's. Ends a process that starts."""

    def __init__(self, setting: str, host: str, port: int, error: OSError) -> None:
        """`setting` is what the port was told with, such as grpc_port."""
        super().__init__(f"can't listen on {host}:{port}: {error.strerror or error}")
        self.setting = setting


class EngineDied(Exception):
    """A worker's engine stopped by itself, and the log has its traceback. Ends the process."""


BY_REASON: dict[str, type[SwitchgearError]] = {
    error.reason: error
    for error in (
        InternalError,
        InvalidRequest,
        ContextTooLong,
        TaskNotSupported,
        Unauthenticated,
        ModelNotAllowed,
        RoutingNotAllowed,
        CallerNotAllowed,
        CredentialsRefused,
        RequestsLimited,
        TokensLimited,
        ModelNotFound,
        Overloaded,
        NoLiveInstance,
        WorkerLost,
        TransferFailed,
        ResponsesUnavailable,
        DeadlineExceeded,
        KvBatchesGone,
        ProtocolViolation,
    )
}
"""Every class that can arrive over a hop."""


def error_of(
    reason: str,
    message: str,
    *,
    param: str | None = None,
    retry_after_seconds: float | None = None,
) -> SwitchgearError:
    """The error that a reason from another hop stands for; an unknown one is a bug there."""
    error_class = BY_REASON.get(reason, InternalError)
    return error_class(message, param=param, retry_after_seconds=retry_after_seconds)
