from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import pytest

from libs.common import errors, grpc_errors
from libs.common.errors import BY_REASON, SwitchgearError
from libs.common.grpc_server import serving
from switchgear.common.v1 import generation_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc


class Failing(kv_indexer_pb2_grpc.KvIndexerServiceServicer):
    """Raises what a test puts in."""

    error: Exception

    async def FindOverlap(
        self, request: kv_indexer_pb2.FindOverlapRequest, context: object
    ) -> kv_indexer_pb2.FindOverlapResponse:
        raise self.error

    async def GetStatus(
        self, request: kv_indexer_pb2.GetStatusRequest, context: object
    ) -> kv_indexer_pb2.GetStatusResponse:
        raise self.error


class Stand(NamedTuple):
    servicer: Failing
    stub: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub


@pytest.fixture
async def failing() -> AsyncIterator[Stand]:
    servicer = Failing()  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server(servicer, server)

    async with (
        serving("127.0.0.1", 0, add, []) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Stand(servicer, kv_indexer_pb2_grpc.KvIndexerServiceStub(channel))


@pytest.mark.parametrize("error_class", BY_REASON.values())
async def test_every_error_crosses_a_call_intact(
    failing: Stand, error_class: type[SwitchgearError]
) -> None:
    servicer, stub = failing
    servicer.error = error_class("said by a test", param="field", retry_after_seconds=1.5)
    with pytest.raises(error_class) as caught, grpc_errors.typed():
        await stub.GetStatus(kv_indexer_pb2.GetStatusRequest())
    assert type(caught.value) is error_class
    assert caught.value.message == "said by a test"
    assert caught.value.param == "field"
    assert caught.value.retry_after_seconds == 1.5


async def test_the_text_of_a_bug_stays_inside(failing: Stand) -> None:
    servicer, stub = failing
    servicer.error = ValueError("a secret")
    with pytest.raises(errors.InternalError) as caught, grpc_errors.typed():
        await stub.GetStatus(kv_indexer_pb2.GetStatusRequest())
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("error_class", BY_REASON.values())
def test_every_error_crosses_a_stream_intact(error_class: type[SwitchgearError]) -> None:
    error = error_class("message", param="field", retry_after_seconds=0.25)
    back = grpc_errors.from_message(grpc_errors.to_message(error))
    assert type(back) is error_class
    assert (back.message, back.param, back.retry_after_seconds) == ("message", "field", 0.25)


@pytest.mark.parametrize("is_retryable", [False, True])
def test_an_error_of_a_newer_version_is_as_retryable_as_its_sender_said(
    is_retryable: bool,
) -> None:
    message = generation_pb2.Error(reason="NEW", message="message", retryable=is_retryable)
    message.retry_after.CopyFrom(grpc_errors.duration_of(0.25))
    error = grpc_errors.from_message(message)
    assert error.is_retryable == is_retryable
    assert (error.message, error.retry_after_seconds) == ("message", 0.25)


def test_reasons_are_unique() -> None:
    assert all(error.reason == reason for reason, error in BY_REASON.items())


def test_durations_are_never_negative() -> None:
    assert grpc_errors.seconds_of(grpc_errors.duration_of(-1)) == 0
    assert grpc_errors.seconds_of(grpc_errors.duration_of(1.25)) == 1.25
