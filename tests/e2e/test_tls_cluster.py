"""A deployment with certificates everywhere, and an etcd and a NATS that ask for passwords."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from deploy.local import certificates, topology
from libs.common.channels import Channels
from libs.common.errors import CallerNotAllowed
from libs.common.grpc_errors import from_rpc_error
from libs.common.grpc_server import CHANNEL_OPTIONS
from libs.common.identity import certificate_name
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from switchgear_client import Client
from tests.e2e.running import LONG_PROMPT, Running, running
from tests.fixtures.eventually import eventually

END_SECONDS = 60


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    run_dir = tmp_path_factory.mktemp("run")
    with running(run_dir, engine="sim", model=tokenizer_folder, tls=True, envoy=True) as started:
        yield started


async def ask_router(channel: grpc.aio.Channel) -> router_pb2.GetSettingsResponse:
    async with channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        return await stub.GetSettings(router_pb2.GetSettingsRequest(), timeout=10)


async def ask_worker(channel: grpc.aio.Channel) -> None:
    async with channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        async for _ in stub.GetKvSnapshot(worker_pb2.GetKvSnapshotRequest(), timeout=10):
            pass


ASKING = pytest.mark.parametrize(
    ("service", "ask"), [("router", ask_router), ("prefill_worker", ask_worker)]
)


def test_a_request_goes_through_all_services(deployment: Running) -> None:
    answer = deployment.chat(LONG_PROMPT)
    assert answer.status == 200
    assert answer.prefill_worker == "prefill_worker-0"
    assert answer.decode_worker == "decode_worker-0"


def test_tools_of_the_launcher_get_through(deployment: Running) -> None:
    deployment.chat(LONG_PROMPT)
    assert "equal" in launcher(deployment, "verify")
    assert "decode_worker-0" in launcher(deployment, "explain")
    assert "in force" in launcher(deployment, "config", "set", "router", "temperature", "0.5")
    assert "0.5" in launcher(deployment, "config", "list")
    assert "in force" in launcher(deployment, "config", "unset", "router", "temperature")
    assert "dead" not in launcher(deployment, "status")


def launcher(deployment: Running, *arguments: str) -> str:
    command = [sys.executable, "-m", "deploy.local", *arguments]
    command += ["--run-dir", str(deployment.cluster.run_dir)]
    return finished(command, os.environ.copy(), expected_status=0)


def finished(command: list[str], environment: dict[str, str], expected_status: int) -> str:
    done = subprocess.run(
        command,
        cwd=topology.REPOSITORY,
        env=environment | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        check=False,
    )
    assert done.returncode == expected_status, done.stdout + done.stderr
    return done.stdout + done.stderr


@ASKING
async def test_a_call_without_a_certificate_is_refused(
    deployment: Running, service: str, ask: object
) -> None:
    assert callable(ask)
    address = deployment.grpc_address(f"{service}-0")
    await ask(deployment.channel(f"{service}-0"))
    ca = grpc.ssl_channel_credentials((deployment.secured / "ca.crt").read_bytes())
    name = [("grpc.ssl_target_name_override", certificate_name(service))]
    for channel in (
        grpc.aio.secure_channel(address, ca, options=[*CHANNEL_OPTIONS, *name]),
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@ASKING
async def test_a_certificate_of_the_wrong_service_is_refused(
    deployment: Running, service: str, ask: object
) -> None:
    assert callable(ask)
    channels = Channels(certificates.files_of(deployment.secured, "decode_worker"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channels.open(deployment.grpc_address(f"{service}-0"), service))
    assert isinstance(from_rpc_error(caught.value), CallerNotAllowed)


async def test_a_worker_is_not_taken_for_a_router(deployment: Running) -> None:
    channels = Channels(certificates.files_of(deployment.secured, "frontend"))
    with pytest.raises(grpc.aio.AioRpcError, match="Hostname Verification") as caught:
        await ask_router(channels.open(deployment.grpc_address("decode_worker-0"), "router"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_other_teams_need_the_ca_only(deployment: Running) -> None:
    ca = grpc.ssl_channel_credentials((deployment.secured / "ca.crt").read_bytes())
    address = deployment.grpc_address("frontend-0")
    async with Client(address, credentials=ca, server_name="frontend.switchgear") as client:
        assert (await client.complete(deployment.model, "Hello", max_tokens=4)).text


async def test_envoy_leads_to_frontends_and_not_to_routers(deployment: Running) -> None:
    address = deployment.url.removeprefix("http://")
    async with Client(address) as client:
        assert (await client.complete(deployment.model, "Hello", max_tokens=4)).text
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_router(grpc.aio.insecure_channel(address))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("service", "server"), [("router", "ETCD"), ("kv_indexer", "NATS")])
def test_a_wrong_password_ends_the_start_with_one_clear_line(
    deployment: Running, tmp_path: Path, service: str, server: str
) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("wrong")
    spec = deployment.cluster.process(f"{service}-0").spec
    command = list(spec.command)
    for flag in ("--grpc-port", "--metrics-port"):
        command[command.index(flag) + 1] = "0"
    variable = f"SWITCHGEAR_{service.upper()}_{server}_PASSWORD_FILE"
    environment = os.environ | spec.environment | {variable: str(wrong)}
    output = finished(command, environment, expected_status=1)
    address = deployment.cluster.process(f"{server.lower()}-0").spec.address
    name = "etcd" if server == "ETCD" else "NATS"
    assert f"{name} at {address} can't be used with these credentials" in output
    assert "uthori" in output or "authentication failed" in output
    assert "Traceback" not in output


async def test_etcd_and_nats_may_restart(deployment: Running) -> None:
    for server in ("etcd-0", "nats-0"):
        await asyncio.to_thread(deployment.cluster.restart, server, END_SECONDS)
    assert (await asyncio.to_thread(deployment.chat, "Who is there?")).status == 200
    # One that starts now is let in, and found.
    await asyncio.to_thread(deployment.cluster.restart, "decode_worker-0", END_SECONDS)

    async def is_answered() -> bool:
        return (await asyncio.to_thread(deployment.chat, "And now?")).status == 200

    await eventually(is_answered)


async def test_replaced_certificates_are_taken_without_a_restart(deployment: Running) -> None:
    host, _, port = deployment.grpc_address("frontend-0").partition(":")

    def shown() -> str:
        return ssl.get_server_certificate((host, int(port)), timeout=10)

    before = await asyncio.to_thread(shown)
    certificates.make(deployment.secured)
    assert await asyncio.to_thread(shown) != before
    # Whoever connects to it now has the new one too.
    await asyncio.to_thread(deployment.cluster.restart, "router-0", END_SECONDS)
    assert (await asyncio.to_thread(deployment.chat, "Still there?")).status == 200
