"""A real etcd and a real NATS that ask for certificates and passwords."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import aetcd
import pytest
from structlog.testing import capture_logs

from deploy.local import certificates, etcd_accounts, topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from libs.common.credentials import CertificateFiles, ServerAccess
from libs.common.discovery import Discovery
from libs.common.errors import CredentialsRefused
from libs.common.etcd_client import EtcdClient
from libs.common.nats_client import connecting
from switchgear.discovery.v1 import discovery_pb2
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import ServerProcess

READY_SECONDS = 30
WORKER = discovery_pb2.Instance(
    instance_id=0xAB, role=discovery_pb2.ROLE_DECODE_WORKER, name="w", address="127.0.0.1:1"
)


class Servers:
    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder

    def url(self, server: str) -> str:
        return self.cluster.process(f"{server}-0").spec.address

    def access(self, server: str) -> ServerAccess:
        return certificates.access_to(server, self.folder)

    def wrong_password(self, server: str) -> ServerAccess:
        (self.folder / "wrong.password").write_text("wrong")
        return replace(self.access(server), password_file=self.folder / "wrong.password")

    def discovery(self, access: ServerAccess, namespace: str = "ns") -> Discovery:
        return Discovery(self.url("etcd"), namespace, access)

    def restart(self, server: str) -> None:
        self.cluster.restart(f"{server}-0", READY_SECONDS)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    run_dir, ports = tmp_path_factory.mktemp("run"), FreePorts()
    folder = topology.certificates_folder(run_dir)
    certificates.make(folder)
    with LocalCluster(run_dir) as cluster:
        cluster.start(
            [
                topology.etcd_server(run_dir, ports.take, folder),
                topology.nats_server(run_dir, ports.take, folder),
            ]
        )
        cluster.wait_ready(READY_SECONDS)
        servers = Servers(cluster, folder)
        etcd_accounts.require_passwords(servers.url("etcd"), folder)
        yield servers


def no_user(servers: Servers, server: str) -> ServerAccess:
    return ServerAccess(servers.access(server).certificates)


def another_ca(servers: Servers, server: str) -> ServerAccess:
    certificates.make(servers.folder / "other")
    files = certificates.files_of(servers.folder, "client")
    ca = servers.folder / "other" / "ca.crt"
    return replace(
        servers.access(server), certificates=CertificateFiles(ca, files.certificate, files.key)
    )


def no_certificate(servers: Servers, server: str) -> ServerAccess:
    files = CertificateFiles(servers.folder / "ca.crt")
    return replace(servers.access(server), certificates=files)


def no_password_file(servers: Servers, server: str) -> ServerAccess:
    return replace(servers.access(server), password_file=servers.folder / "nothing")


WRONG = [Servers.wrong_password, no_user, another_ca, no_password_file]
Wrong = Callable[[Servers, str], ServerAccess]


@pytest.mark.parametrize("wrong", [*WRONG, no_certificate])
async def test_a_start_is_told_that_etcd_does_not_let_it_in(servers: Servers, wrong: Wrong) -> None:
    discovery = servers.discovery(wrong(servers, "etcd"))
    with pytest.raises(CredentialsRefused, match=f"etcd at {servers.url('etcd')} can't be used"):
        await discovery.check_access()
    with pytest.raises(CredentialsRefused):
        await discovery.read("instances/", discovery_pb2.Instance)


@pytest.mark.parametrize(
    ("wrong", "problem"), [(another_ca, "peer_untrusted"), (no_certificate, "own_refused")]
)
async def test_a_wrong_certificate_at_etcd_is_told_in_one_line(
    servers: Servers, wrong: Wrong, problem: str
) -> None:
    with capture_logs() as logs, pytest.raises(CredentialsRefused):
        await servers.discovery(wrong(servers, "etcd")).check_access()
    [line] = [log for log in logs if log["event"] == "connection not trusted"]
    assert (line["peer"], line["problem"]) == ("etcd", problem)


async def test_another_ca_at_nats_is_told_in_one_line(servers: Servers) -> None:
    with capture_logs() as logs, pytest.raises(CredentialsRefused):
        async with connecting(servers.url("nats"), "test", another_ca(servers, "nats")):
            pass
    [line] = [log for log in logs if log["event"] == "connection not trusted"]
    assert (line["peer"], line["problem"]) == ("nats", "peer_untrusted")


async def test_a_user_of_etcd_sees_switchgears_keys_only(servers: Servers) -> None:
    client = EtcdClient(servers.url("etcd"), servers.access("etcd"), 5, {})
    async with client:
        await client.get(b"/switchgear/v1/ns/config/router/temperature")
        with pytest.raises(aetcd.ClientError, match="permission denied"):
            await client.get(b"/elsewhere")


async def test_registering_outlives_a_restart_of_an_etcd_with_passwords(servers: Servers) -> None:
    there = servers.discovery(servers.access("etcd"))
    await there.check_access()
    late = discovery_pb2.Instance(instance_id=2, role=discovery_pb2.ROLE_ROUTER, name="late")
    async with (
        there.watching("instances/", discovery_pb2.Instance) as instances,
        there.registered(WORKER),
    ):
        await until(lambda: WORKER in instances.values())
        await asyncio.to_thread(servers.restart, "etcd")
        async with servers.discovery(servers.access("etcd")).registered(late):
            await until(lambda: late in instances.values())
        assert WORKER in instances.values()


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_start_is_told_that_nats_does_not_let_it_in(servers: Servers, wrong: Wrong) -> None:
    with pytest.raises(CredentialsRefused, match=f"NATS at {servers.url('nats')} can't be used"):
        async with connecting(servers.url("nats"), "test", wrong(servers, "nats")):
            pass


async def test_without_a_certificate_nats_is_never_connected(servers: Servers) -> None:
    # A server says so when the client believes the handshake done, and often that is lost.
    with suppress(CredentialsRefused):
        access = no_certificate(servers, "nats")
        async with connecting(servers.url("nats"), "test", access) as nats:
            assert not nats.is_connected


async def test_a_subscription_outlives_a_restart_of_a_nats_with_passwords(servers: Servers) -> None:
    url, access, received = servers.url("nats"), servers.access("nats"), []

    async def on_message(message: object) -> None:
        received.append(message)

    async with connecting(url, "reader", access) as reader:
        assert reader.is_connected
        await reader.subscribe("subject", cb=on_message)
        await asyncio.to_thread(servers.restart, "nats")
        async with connecting(url, "writer", access) as writer:

            async def arrives() -> bool:
                # What is published before the subscription is back is lost.
                await writer.publish("subject", b"x")
                return bool(received)

            await eventually(arrives)


@pytest.mark.parametrize("access", [Servers.access, no_user])
async def test_nothing_is_ever_sent_to_a_nats_without_the_tls_that_was_asked_for(
    nats_server: ServerProcess, servers: Servers, access: Wrong
) -> None:
    url = nats_server.url.replace("nats://", "tls://")
    with pytest.raises(CredentialsRefused, match="the server offers no TLS"):
        async with connecting(url, "test", access(servers, "nats")):
            pass


async def test_a_token_lets_in_as_well(
    tmp_path: Path, start_nats: Callable[..., ServerProcess]
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    server = start_nats("--auth", "s3cret")
    async with connecting(server.url, "test", ServerAccess(token_file=tmp_path / "token")) as nats:
        assert nats.is_connected
    (tmp_path / "token").write_text("other")
    with pytest.raises(CredentialsRefused, match="Authorization Violation"):
        async with connecting(server.url, "test", ServerAccess(token_file=tmp_path / "token")):
            pass


async def test_a_password_that_nats_changes_is_taken_from_the_file_once_it_is_there(
    tmp_path: Path, start_nats: Callable[..., ServerProcess]
) -> None:
    def set_password(password: str) -> None:
        config = f'authorization {{ user: u, password: "{password}" }}'
        (tmp_path / "nats.conf").write_text(config)

    set_password("old")
    (tmp_path / "password").write_text("old")
    access = ServerAccess(username="u", password_file=tmp_path / "password")
    server = start_nats("-c", str(tmp_path / "nats.conf"))
    async with connecting(server.url, "test", access) as nats:
        server.stop()
        set_password("new")
        server.start()
        await until(lambda: not nats.is_connected and "Authorization" in str(nats.last_error))
        (tmp_path / "password").write_text("new")
        await until(lambda: nats.is_connected)
