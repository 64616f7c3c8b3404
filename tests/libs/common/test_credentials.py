"""Files that prove who a process is: checked, and followed when they are replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.local import certificates
from libs.common.credentials import CertificateFiles, FollowedCertificates, secret_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*certificates.SERVICES, "etcd", "nats", "envoy", "client"])
def test_what_is_made_can_be_used(folder: Path, name: str) -> None:
    pem = certificates.files_of(folder, name).read()
    assert pem.ca == (folder / "ca.crt").read_bytes()
    assert pem.certificate == (folder / f"{name}.crt").read_bytes()


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "router.key").unlink()
    with pytest.raises(ValueError, match=f"can't read {folder}/router.key: No such file"):
        certificates.files_of(folder, "router").read()


def test_a_key_of_another_certificate_is_named(folder: Path) -> None:
    files = CertificateFiles(folder / "ca.crt", folder / "router.crt", folder / "etcd.key")
    with pytest.raises(ValueError, match=r"router.crt and .*etcd.key are not a certificate and"):
        files.read()


def test_a_ca_that_is_none_is_named(folder: Path) -> None:
    (folder / "ca.crt").write_text("hello")
    with pytest.raises(ValueError, match=r"ca.crt has no CA certificates"):
        certificates.files_of(folder, "router").read()


def test_replaced_files_are_noticed(folder: Path) -> None:
    files = certificates.files_of(folder, "router")
    followed = FollowedCertificates(files)
    before = followed.latest()
    assert (followed.latest(), followed.version) == (before, 1)
    certificates.make(folder)
    after = followed.latest()
    assert (after, followed.version) == (files.read(), 2)
    assert (after.ca, after.certificate == before.certificate) == (before.ca, False)


def test_while_files_are_being_replaced_the_former_ones_are_used(folder: Path) -> None:
    files = certificates.files_of(folder, "router")
    followed = FollowedCertificates(files)
    before, key = followed.latest(), (folder / "router.key").read_bytes()
    certificates.make(folder)
    new_key = (folder / "router.key").read_bytes()
    (folder / "router.key").write_bytes(key)
    assert followed.latest() == before
    (folder / "router.key").unlink()
    assert (followed.latest(), followed.version) == (before, 1)
    (folder / "router.key").write_bytes(new_key)
    assert followed.latest() == files.read() != before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not hold one line"),
        (b"a\nb\n", "does not hold one line"),
        (b"\xff\xfe", "is not a text"),
    ],
)
def test_a_file_that_holds_no_secret_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {problem}"):
        secret_in(path)


def test_the_end_of_a_secrets_line_is_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("abc\n")
    assert secret_in(tmp_path / "password") == "abc"


def test_only_the_owner_may_read_what_is_secret(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077} == {
        name for name in os.listdir(folder) if name.endswith(".crt")
    }


def test_a_ca_stays_and_so_do_passwords(folder: Path) -> None:
    kept = ("ca.crt", "ca.key", "etcd.password", "etcd_root.password", "nats.password", "nats.conf")
    before = [(folder / name).read_bytes() for name in kept]
    certificates.make(folder)
    assert [(folder / name).read_bytes() for name in kept] == before


def test_a_ca_that_cant_be_used_is_not_replaced(folder: Path) -> None:
    (folder / "ca.key").write_text("hello")
    with pytest.raises(ValueError, match="the CA in .* can't be used"):
        certificates.make(folder)
