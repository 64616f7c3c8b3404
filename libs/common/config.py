"""Settings from flags and environment, the same way in every service.

A setting `etcd_url` of the router is `--etcd-url` or SWITCHGEAR_ROUTER_ETCD_URL; flags win. The
long prefix keeps clear of variables that Kubernetes injects for services (ROUTER_PORT=tcp://...).
An unknown or malformed setting stops the process, by name and value.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from libs.common.credentials import CertificateFiles, ServerAccess, secret_in

_URL_FORMS = {
    "etcd_url": "http://host:port or https://host:port",
    "nats_url": "nats://host:port or tls://host:port",
    "otlp_endpoint": "http://host:port or https://host:port",
}
"""What to write where a pattern tells a person little."""


class ConfigError(Exception):
    """A setting is unknown or has a value that can't be used. The text names both."""


class ServiceSettings(BaseSettings):
    """What every service can be told. Subclasses set `env_prefix`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    name: str = Field(default="", max_length=100, pattern=r"^[A-Za-z0-9._-]*$")
    """This process's name in logs, response headers and tables. Default: component and port."""

    namespace: str = Field(default="default", min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    """Deployment this process belongs to; deployments do not see each other."""

    etcd_url: str = Field(default="http://127.0.0.1:2379", pattern=r"^https?://[^/:]+:\d+$")
    """etcd, as http://host:port, or https://host:port with TLS."""

    etcd_username: str = ""
    """User of etcd; empty for none. Needs `etcd_password_file`."""

    etcd_password_file: Path | None = None
    """File with the user's password. It is read again for each connection."""

    tls_ca_file: Path | None = None
    """CA that signs all services' certificates, in PEM. With it and the next two every call between
    services is encrypted, and both sides show certificates; without all three none is."""

    tls_certificate_file: Path | None = None
    """This process's certificate, in PEM, with a name such as router.switchgear. Another one is
    taken for new connections when the file is replaced."""

    tls_key_file: Path | None = None
    """The certificate's key, in PEM, without a passphrase."""

    etcd_ca_file: Path | None = None
    """CA of etcd's certificate. Default: `tls_ca_file`, or the system's."""

    etcd_certificate_file: Path | None = None
    """Certificate that etcd is shown. Default: `tls_certificate_file`, if there is one."""

    etcd_key_file: Path | None = None
    """That certificate's key. Default: `tls_key_file`."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 needs `advertise_host`, since others must be told where."""

    advertise_host: str = ""
    """Host that others reach this process by. Default: `host`."""

    grpc_port: int = Field(default=0, ge=0, le=65535)
    """Port of the gRPC services; 0 takes a free one, others learn it from etcd."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of Prometheus metrics at /metrics; 0 takes a free one."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines that are written."""

    log_format: Literal["json", "console"] = "json"
    """json for collectors, console for people."""

    otlp_endpoint: str = Field(default="", pattern=r"^(https?://[^/:]+:\d+)?$")
    """Collector that gets spans of sampled requests, as http://host:port, by OTLP over gRPC. Empty:
    no tracing."""

    drain_seconds: float = Field(default=30.0, ge=0)
    """How long a stopping process lets running requests finish before it cuts them off."""

    @property
    def reachable_host(self) -> str:
        """The host to publish; never a wildcard."""
        host = self.advertise_host or self.host
        if host in ("0.0.0.0", "::"):
            raise ConfigError(f"advertise_host must be set when host is {host}")
        return host

    @property
    def certificates(self) -> CertificateFiles | None:
        """What this process shows other services, and trusts them by; None without TLS."""
        if self.tls_ca_file is None:
            return None
        return CertificateFiles(self.tls_ca_file, self.tls_certificate_file, self.tls_key_file)

    @property
    def etcd_access(self) -> ServerAccess:
        """How etcd lets this process in."""
        return ServerAccess(
            self._certificates_for("etcd"), self.etcd_username, self.etcd_password_file
        )

    def _certificates_for(self, server: str) -> CertificateFiles:
        """The server's own settings where there are any."""
        ca, certificate, key = (
            getattr(self, f"{server}_{part}_file") for part in ("ca", "certificate", "key")
        )
        if certificate is None:
            certificate, key = self.tls_certificate_file, self.tls_key_file
        return CertificateFiles(ca or self.tls_ca_file, certificate, key)

    def check_files(self) -> None:
        """Raises ConfigError for certificates and passwords that are incomplete or can't be
        used."""
        self._check_together("tls_ca_file", "tls_certificate_file", "tls_key_file")
        if self.certificates is not None:
            self._check_certificates("tls", self.certificates)
        self._check_access("etcd", self.etcd_access)

    def _check_access(self, server: str, access: ServerAccess) -> None:
        self._check_together(f"{server}_certificate_file", f"{server}_key_file")
        self._check_together(f"{server}_username", f"{server}_password_file")
        self._check_certificates(server, access.certificates)
        for name in (f"{server}_password_file", f"{server}_token_file"):
            path: Path | None = getattr(self, name, None)
            try:
                if path is not None:
                    secret_in(path)
            except ValueError as error:
                raise ConfigError(f"{self.named(name)}: {error}") from error

    def _check_certificates(self, purpose: str, files: CertificateFiles) -> None:
        try:
            if files != CertificateFiles():
                files.read()
        except ValueError as error:
            raise ConfigError(f"certificates for {purpose}: {error}") from error

    def _check_together(self, *names: str) -> None:
        missing = [name for name in names if not getattr(self, name)]
        if missing and len(missing) < len(names):
            there = next(name for name in names if name not in missing)
            raise ConfigError(
                f"{', '.join(map(self.named, missing))} must be set with {self.named(there)}"
            )

    def named(self, name: str) -> str:
        """A setting as people give it: its flag and its variable."""
        return _named(self.model_config.get("env_prefix", ""), name)


class NatsSettings(ServiceSettings):
    """What services that use NATS can be told besides."""

    nats_url: str = Field(default="nats://127.0.0.1:4222", pattern=r"^(nats|tls)://[^@]+$")
    """NATS, as nats://host:port, or tls://host:port with TLS. User and password have settings of
    their own, since URLs are in commands and logs."""

    nats_username: str = ""
    """User of NATS; empty for none. Needs `nats_password_file`."""

    nats_password_file: Path | None = None
    """File with the user's password. It is read again for each connection."""

    nats_token_file: Path | None = None
    """File with a token for NATS, in place of user and password."""

    nats_ca_file: Path | None = None
    """CA of NATS's certificate. Default: `tls_ca_file`, or the system's."""

    nats_certificate_file: Path | None = None
    """Certificate that NATS is shown. Default: `tls_certificate_file`, if there is one."""

    nats_key_file: Path | None = None
    """That certificate's key. Default: `tls_key_file`."""

    @property
    def nats_access(self) -> ServerAccess:
        """How NATS lets this process in."""
        return ServerAccess(
            self._certificates_for("nats"),
            self.nats_username,
            self.nats_password_file,
            self.nats_token_file,
        )

    def check_files(self) -> None:
        super().check_files()
        if self.nats_username and self.nats_token_file:
            raise ConfigError(
                f"{self.named('nats_username')} and {self.named('nats_token_file')} are both set"
            )
        self._check_access("nats", self.nats_access)


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def load(
    settings: type[SettingsT], argv: Sequence[str], environ: Mapping[str, str], program: str
) -> SettingsT:
    """Reads and checks the settings of one process.

    Raises ConfigError for a bad one. `--help` and an unknown flag exit as argparse does.
    """
    prefix = settings.model_config.get("env_prefix", "")
    known = {f"{prefix}{name}".upper() for name in settings.model_fields}
    unknown = sorted(
        name for name in environ if name.upper().startswith(prefix) and name.upper() not in known
    )
    if prefix and unknown:
        listed = ", ".join(f"{name}={_shown(name, environ[name])}" for name in unknown)
        raise ConfigError(f"unknown setting: {listed}")

    class Program(settings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(cli_prog_name=program)

    Program.__doc__ = settings.__doc__
    try:
        loaded: SettingsT = CliApp.run(Program, cli_args=list(argv))
        loaded.reachable_host  # noqa: B018 - raises when it can't be told
        loaded.check_files()
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_describe(settings, issue) for issue in error.errors())
        ) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    return loaded


def _describe(settings: type[ServiceSettings], issue: ErrorDetails) -> str:
    if not issue["loc"]:
        return issue["msg"]
    name = str(issue["loc"][0])
    named = _named(settings.model_config.get("env_prefix", ""), name)
    if issue["type"] == "missing":
        return f"{named} must be set"
    problem = issue["msg"]
    if issue["type"] == "string_pattern_mismatch" and name in _URL_FORMS:
        problem = f"it must be given as {_URL_FORMS[name]}"
    return f"{named} is {_shown(name, issue['input'])}: {problem}"


def _shown(name: str, value: object) -> str:
    """A value as it may be told: who mistakes a file's setting for the password's own, or puts one
    into a URL, does not find it in the log."""
    if re.search("PASSWORD|TOKEN$|SECRET", name.upper()):
        return "(not shown)"
    return re.sub(r"//.*@", "//(not shown)@", repr(value))


def _named(prefix: str, name: str) -> str:
    return f"--{name.replace('_', '-')} ({prefix}{name.upper()})"


def exit_on_bad_settings(
    settings: type[SettingsT], argv: Sequence[str], environ: Mapping[str, str], program: str
) -> SettingsT:
    """`load` for a `main`: prints the problem and exits with 2, as for a wrong flag."""
    try:
        return load(settings, argv, environ, program)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
