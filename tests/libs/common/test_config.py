from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from deploy.local import certificates
from libs.common.config import (
    ConfigError,
    NatsSettings,
    ServiceSettings,
    exit_on_bad_settings,
    load,
)
from libs.common.credentials import CertificateFiles, ServerAccess


class ExampleSettings(ServiceSettings):
    """An example."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_EXAMPLE_")

    weight: float = Field(default=1.0, ge=0)
    """What it weighs."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExampleSettings]:
    def read(*argv: str, **environ: str) -> ExampleSettings:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return load(ExampleSettings, argv, environ, "example")

    return read


Read = Callable[..., ExampleSettings]


def test_flags_win_over_the_environment_and_that_over_defaults(read: Read) -> None:
    assert read().weight == 1.0
    environ = {"SWITCHGEAR_EXAMPLE_WEIGHT": "2", "SWITCHGEAR_EXAMPLE_NAME": "x-1"}
    assert read(**environ).weight == 2.0
    settings = read("--weight", "3", **environ)
    assert (settings.weight, settings.name) == (3.0, "x-1")


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (("--weight", "-1"), {}, ("--weight", "'-1'")),
        (("--weight", "heavy"), {}, ("--weight", "'heavy'")),
        (("--grpc-port", "70000"), {}, ("--grpc-port", "'70000'")),
        (("--etcd-url", "localhost"), {}, ("--etcd-url", "'localhost'")),
        ((), {"SWITCHGEAR_EXAMPLE_WEIGHT": "-2"}, ("SWITCHGEAR_EXAMPLE_WEIGHT", "'-2'")),
        ((), {"SWITCHGEAR_EXAMPLE_WIEGHT": "2"}, ("SWITCHGEAR_EXAMPLE_WIEGHT", "'2'")),
        (("--host", "0.0.0.0"), {}, ("advertise_host", "0.0.0.0")),
    ],
)
def test_a_bad_setting_is_named_with_its_value(
    read: Read, argv: tuple[str, ...], environ: dict[str, str], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv, **environ)
    assert all(part in str(caught.value) for part in named)


def test_a_setting_that_is_missing_is_not_told_as_a_wrong_value() -> None:
    class Example(ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_EXAMPLE_")

        model: str

    with pytest.raises(ConfigError) as caught:
        load(Example, ["--name", "x"], {}, "example")
    assert str(caught.value) == "--model (SWITCHGEAR_EXAMPLE_MODEL) must be set"


@pytest.mark.parametrize(
    ("flag", "form"),
    [
        ("--etcd-url", "http://host:port or https://host:port"),
        ("--nats-url", "nats://host:port or tls://host:port"),
        ("--otlp-endpoint", "http://host:port or https://host:port"),
    ],
)
def test_a_malformed_url_is_told_in_what_form_it_should_be(flag: str, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(NatsSettings, [flag, "localhost"], {}, "example")
    assert str(caught.value).endswith(f"is 'localhost': it must be given as {form}")


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        ((), {"SWITCHGEAR_EXAMPLE_ETCD_PASSWORD": "s3cret"}, "SWITCHGEAR_EXAMPLE_ETCD_PASSWORD"),
        ((), {"SWITCHGEAR_EXAMPLE_NATS_TOKEN": "s3cret"}, "SWITCHGEAR_EXAMPLE_NATS_TOKEN"),
        (("--nats-url", "nats://u:s3cret@host:4222"), {}, "@host:4222"),
        (("--etcd-url", "http://u:s3cret@host:2379"), {}, "@host:2379"),
    ],
)
def test_a_password_in_a_wrong_place_is_refused_and_not_told(
    argv: tuple[str, ...], environ: dict[str, str], named: str
) -> None:
    class Example(NatsSettings):
        model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_EXAMPLE_")

    with pytest.raises(ConfigError) as caught:
        load(Example, argv, environ, "example")
    assert named in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_unknown_flag_ends_the_process(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--wieght", "3")
    assert caught.value.code == 2
    assert "--wieght" in capsys.readouterr().err


def test_a_bad_setting_ends_the_process_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_bad_settings(ExampleSettings, ["--weight", "-1"], {}, "example")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("example: --weight (SWITCHGEAR_EXAMPLE_WEIGHT)")


def test_variables_of_others_are_not_ours(read: Read) -> None:
    assert read(EXAMPLE_WEIGHT="9", SWITCHGEAR_OTHER_WEIGHT="9").weight == 1.0


def test_help_shows_what_each_setting_is_for(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "An example." in text
    assert "What it weighs." in text


def tls_flags(folder: Path, name: str) -> list[str]:
    files = ("--tls-ca-file", "ca.crt", "--tls-certificate-file", f"{name}.crt")
    flags = [*files, "--tls-key-file", f"{name}.key"]
    return [flag if flag.startswith("--") else str(folder / flag) for flag in flags]


def test_without_certificates_there_is_no_tls(read: Read) -> None:
    assert read().certificates is None
    assert read().etcd_access == ServerAccess()


def test_etcd_and_nats_are_shown_the_services_certificate_unless_they_have_their_own(
    tmp_path: Path,
) -> None:
    certificates.make(tmp_path)
    flags = [*tls_flags(tmp_path, "router"), "--etcd-ca-file", str(tmp_path / "etcd.crt")]
    flags += ["--nats-certificate-file", str(tmp_path / "client.crt")]
    flags += ["--nats-key-file", str(tmp_path / "client.key")]
    flags += ["--nats-token-file", str(tmp_path / "nats.password")]
    settings = load(NatsSettings, flags, {}, "example")
    router = certificates.files_of(tmp_path, "router")
    assert settings.certificates == router
    assert settings.etcd_access == ServerAccess(
        CertificateFiles(tmp_path / "etcd.crt", router.certificate, router.key)
    )
    client = certificates.files_of(tmp_path, "client")
    assert settings.nats_access == ServerAccess(client, token_file=tmp_path / "nats.password")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tls-ca-file", "ca.crt"], "--tls-certificate-file .*, --tls-key-file .* must be set"),
        (
            ["--tls-certificate-file", "router.crt", "--tls-key-file", "router.key"],
            "--tls-ca-file .*TLS_CA_FILE.* must be set with --tls-certificate-file",
        ),
        (["--etcd-key-file", "router.key"], "--etcd-certificate-file .* must be set with"),
        (["--etcd-username", "x"], "--etcd-password-file .* must be set with --etcd-username"),
        (["--nats-password-file", "nats.password"], "--nats-username .* must be set with"),
        (["--etcd-ca-file", "nothing"], "certificates for etcd: can't read .*nothing"),
        (["--nats-token-file", "nothing"], "--nats-token-file .*: can't read .*nothing"),
        (
            [
                *("--nats-username", "x", "--nats-password-file", "nats.password"),
                *("--nats-token-file", "nats.password"),
            ],
            "--nats-username .* and --nats-token-file .* are both set",
        ),
        (
            [
                *("--tls-ca-file", "ca.crt", "--tls-certificate-file", "router.crt"),
                *("--tls-key-file", "client.key"),
            ],
            "certificates for tls: .*router.crt and .*client.key are not a certificate and its key",
        ),
    ],
)
def test_credentials_that_are_incomplete_or_cant_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], problem: str
) -> None:
    certificates.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem):
        load(NatsSettings, flags, {}, "example")
