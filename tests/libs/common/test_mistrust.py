"""A wrong certificate is told from an absent process, in one log line and one metric."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from deploy.local import certificates
from libs.common import mistrust
from libs.common.channels import Channels
from libs.common.credentials import CertificateFiles
from libs.common.errors import SwitchgearError
from libs.common.grpc_server import serving
from libs.common.mistrust import Problem, find_mistrust
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.mutual_tls import server
from tests.fixtures.servers import free_port


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificates of two CAs that know nothing of each other."""
    made = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    for folder in made:
        certificates.make(folder)
    return made


def counted(peer: str, problem: Problem) -> float:
    labels = {"peer": peer, "problem": problem.value}
    return REGISTRY.get_sample_value("switchgear_untrusted_connections_total", labels) or 0.0


Shown = Callable[[Path, Path], CertificateFiles]


def of_its_ca(one: Path, other: Path) -> CertificateFiles:
    return certificates.files_of(one, "frontend")


def of_another_ca(one: Path, other: Path) -> CertificateFiles:
    return certificates.files_of(other, "frontend")


def signed_by_another_ca(one: Path, other: Path) -> CertificateFiles:
    theirs = certificates.files_of(other, "frontend")
    return CertificateFiles(one / "ca.crt", theirs.certificate, theirs.key)


def nothing(one: Path, other: Path) -> CertificateFiles:
    return CertificateFiles(one / "ca.crt")


@pytest.mark.parametrize(
    ("shown", "component", "problem", "told"),
    [
        (of_its_ca, "kv_indexer", Problem.PEER_NAME, "of router.switchgear, which is not kv-index"),
        (of_another_ca, "router", Problem.PEER_UNTRUSTED, "ca.crt: unable to get local issuer"),
        (signed_by_another_ca, "router", Problem.OWN_REFUSED, "does not trust "),
        (nothing, "router", Problem.OWN_REFUSED, "wants a certificate of ours"),
    ],
)
async def test_whose_certificate_is_wrong_is_logged_and_counted_once(
    folders: tuple[Path, Path], shown: Shown, component: str, problem: Problem, told: str
) -> None:
    before = counted(component, problem)
    files = shown(*folders)
    async with server(folders[0], "router") as running:
        address, channels = f"127.0.0.1:{running.port}", Channels(files)
        with capture_logs() as logs:
            for _ in range(2):
                with pytest.raises(SwitchgearError):
                    await ask(channels, address, component)
            await until(lambda: logs)
    [line] = logs
    assert line["log_level"] == "error"
    assert (line["peer"], line["address"], line["problem"]) == (component, address, problem)
    assert told in line["details"]
    assert counted(component, problem) == before + 1


async def ask(channels: Channels, address: str, component: str) -> None:
    async with channels.calling(address, component) as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        async for _ in stub.GetModelFiles(worker_pb2.GetModelFilesRequest(), timeout=10):
            pass


async def test_who_may_not_call_is_told_which_name_it_showed(folders: tuple[Path, Path]) -> None:
    before = counted("router", Problem.OWN_NAME)
    async with server(folders[0], "router") as running:
        channels = Channels(certificates.files_of(folders[0], "decode_worker"))
        with capture_logs() as logs, pytest.raises(SwitchgearError):
            await ask(channels, f"127.0.0.1:{running.port}", "router")
    [line] = logs
    assert line["details"] == "router takes no calls with a certificate of worker.switchgear"
    assert counted("router", Problem.OWN_NAME) == before + 1


async def test_absence_good_certificates_and_plain_text_are_told_apart(
    folders: tuple[Path, Path],
) -> None:
    files = certificates.files_of(folders[0], "frontend")
    async with server(folders[0], "router") as running:
        assert await find_mistrust(f"127.0.0.1:{running.port}", "router.switchgear", files) is None
    gone = f"127.0.0.1:{free_port()}"
    assert await find_mistrust(gone, "router.switchgear", files) is None
    async with serving("127.0.0.1", 0, lambda _: None, [], grace_seconds=0) as plain:
        found = await find_mistrust(f"127.0.0.1:{plain.port}", "router.switchgear", files)
    assert found is not None
    assert found.problem is Problem.NO_TLS


async def test_who_says_nothing_is_not_waited_for(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mistrust, "HANDSHAKE_SECONDS", 0.1)

    # The kernel takes the connection, and that is all.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        files = certificates.files_of(folders[0], "frontend")
        assert await find_mistrust(address, "router.switchgear", files) is None
