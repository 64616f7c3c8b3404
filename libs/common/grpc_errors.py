"""Our errors as gRPC statuses with google.rpc details, and back; and as messages in streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from libs.common import errors
from libs.common.errors import SwitchgearError
from switchgear.common.v1 import generation_pb2

DOMAIN = "switchgear"


def to_status(error: Exception) -> grpc.Status:
    """The status that stands for an error. The text of a bug stays out of it."""
    if not isinstance(error, SwitchgearError):
        error = errors.InternalError("internal error")
    code: int = error.code.value[0]
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.param is not None:
        info.metadata["param"] = error.param
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if error.retry_after_seconds is not None:
        retry = any_pb2.Any()
        retry.Pack(error_details_pb2.RetryInfo(retry_delay=duration_of(error.retry_after_seconds)))
        details.append(retry)
    status = status_pb2.Status(
        code=code_pb2.Code.ValueType(code), message=error.message, details=details
    )
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError) -> SwitchgearError:
    """The error that a failed call stands for, with or without our details."""
    message = error.details() or error.code().name
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after = seconds_of(retry.retry_delay)
    if info.domain == DOMAIN:
        param = info.metadata.get("param")
        return errors.error_of(info.reason, message, param=param, retry_after_seconds=retry_after)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return errors.NoLiveInstance(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(message)
        case _:
            return errors.InternalError(message)


@contextmanager
def typed() -> Iterator[None]:
    """Turns grpc's errors of the calls in the body into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def to_message(error: SwitchgearError) -> generation_pb2.Error:
    """The error as data in a stream that goes on."""
    message = generation_pb2.Error(
        reason=error.reason,
        message=error.message,
        retryable=error.is_retryable,
        param=error.param or "",
    )
    if error.retry_after_seconds is not None:
        message.retry_after.CopyFrom(duration_of(error.retry_after_seconds))
    return message


def from_message(message: generation_pb2.Error) -> SwitchgearError:
    """The error that came as data in a stream."""
    retry_after = seconds_of(message.retry_after) if message.HasField("retry_after") else None
    if message.retryable and message.reason not in errors.BY_REASON:
        # Of a newer version: what to do about it matters more than its name.
        return errors.NoLiveInstance(message.message, retry_after_seconds=retry_after)
    return errors.error_of(
        message.reason,
        message.message,
        param=message.param or None,
        retry_after_seconds=retry_after,
    )


def duration_of(seconds: float) -> duration_pb2.Duration:
    """A protobuf duration; never negative."""
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def seconds_of(duration: duration_pb2.Duration) -> float:
    """Seconds of a protobuf duration."""
    return duration.seconds + duration.nanos / 1e9
