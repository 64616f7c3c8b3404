"""Who gets through to whom when both ends show certificates."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local import certificates
from libs.common import identity
from libs.common.channels import Channels, open_blocking
from libs.common.errors import CallerNotAllowed
from libs.common.grpc_errors import from_rpc_error
from libs.common.grpc_server import serving
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.mutual_tls import server

COMPONENTS = ("frontend", "router", "kv_indexer", "prefill_worker", "decode_worker", "client")


async def failure(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError | None:
    """Of a call; None when it is answered."""
    async with channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            async for _ in stub.GetModelFiles(worker_pb2.GetModelFilesRequest(), timeout=10):
                pass
        except grpc.aio.AioRpcError as error:
            return error
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    certificates.make(made)
    return made


@pytest.mark.parametrize("component", ["router", "kv_indexer", "prefill_worker", "decode_worker"])
async def test_only_those_that_have_business_there_may_call(folder: Path, component: str) -> None:
    async with server(folder, component) as running:
        for caller in COMPONENTS:
            channels = Channels(certificates.files_of(folder, caller))
            error = await failure(channels.open(f"127.0.0.1:{running.port}", component))
            if caller in identity.CALLERS[component]:
                assert error is None
            else:
                assert error is not None
                assert isinstance(from_rpc_error(error), CallerNotAllowed)
                assert identity.certificate_name(caller) in (error.details() or "")


async def test_whoever_has_a_certificate_may_ask_for_health(folder: Path) -> None:
    async with server(folder, "router") as running:
        channels = Channels(certificates.files_of(folder, "decode_worker"))
        async with channels.open(f"127.0.0.1:{running.port}", "router") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("poser", ["decode_worker", "prefill_worker", "kv_indexer", "client"])
async def test_a_certificate_of_another_service_does_not_pose_as_a_router(
    folder: Path, poser: str
) -> None:
    async with server(folder, poser) as running:
        channels = Channels(certificates.files_of(folder, "frontend"))
        error = await failure(channels.open(f"127.0.0.1:{running.port}", "router"))
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Hostname Verification" in (error.details() or "")


async def test_neither_plain_text_nor_a_call_without_a_certificate_is_answered(
    folder: Path,
) -> None:
    async with server(folder, "router") as running:
        address = f"127.0.0.1:{running.port}"
        without = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes())
        options = [("grpc.ssl_target_name_override", "router.switchgear")]
        for channel in (
            Channels().open(address, "router"),
            grpc.aio.secure_channel(address, without, options=options),
        ):
            error = await failure(channel)
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_is_worth_nothing(folder: Path, tmp_path: Path) -> None:
    certificates.make(tmp_path)
    async with server(folder, "router") as running:
        address = f"127.0.0.1:{running.port}"
        theirs = certificates.files_of(tmp_path, "frontend")
        error = await failure(Channels(theirs).open(address, "router"))
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_frontend_asks_nobody_for_a_certificate(folder: Path) -> None:
    async with server(folder, "frontend") as running:
        credentials = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes())
        # Found by its address, without being told another name.
        channel = grpc.aio.secure_channel(f"127.0.0.1:{running.port}", credentials)
        assert await failure(channel) is None


async def test_new_connections_are_shown_replaced_certificates(tmp_path: Path) -> None:
    certificates.make(tmp_path)
    channels = Channels(certificates.files_of(tmp_path, "frontend"))
    async with server(tmp_path, "router") as running:
        address = f"127.0.0.1:{running.port}"
        first = channels.version
        assert await failure(channels.open(address, "router")) is None
        # Another CA: who still had the certificates of the first one would be refused.
        for file in ("ca.crt", "ca.key"):
            (tmp_path / file).unlink()
        certificates.make(tmp_path)
        assert channels.version == first + 1
        assert await failure(channels.open(address, "router")) is None


async def test_without_certificates_nothing_is_encrypted() -> None:
    channels = Channels()
    async with (
        serving("127.0.0.1", 0, lambda _: None, [], grace_seconds=0) as running,
        channels.open(f"127.0.0.1:{running.port}", "router") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert channels.version == 0


def test_a_program_without_an_event_loop_is_told_of_a_file_that_cant_be_used(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"can't read .*ca.crt"):
        open_blocking("127.0.0.1:1", "router", certificates.files_of(tmp_path, "client"))
