"""Settings from flags and environment, the same way in every service.

A setting `etcd_url` of the router is `--etcd-url` or SWITCHGEAR_ROUTER_ETCD_URL; flags win. The
long prefix keeps clear of variables that Kubernetes injects for services (ROUTER_PORT=tcp://...).
An unknown or malformed setting stops the process, by name and value.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError


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
    """etcd, as http://host:port."""

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


class NatsSettings(ServiceSettings):
    """What services that use NATS can be told besides."""

    nats_url: str = Field(default="nats://127.0.0.1:4222", pattern=r"^(nats|tls)://.+$")
    """NATS, as nats://host:port."""


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
        listed = ", ".join(f"{name}={environ[name]!r}" for name in unknown)
        raise ConfigError(f"unknown setting: {listed}")

    class Program(settings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(cli_prog_name=program)

    Program.__doc__ = settings.__doc__
    try:
        loaded: SettingsT = CliApp.run(Program, cli_args=list(argv))
        loaded.reachable_host  # noqa: B018 - raises when it can't be told
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                _describe(prefix, issue["loc"], issue["input"], issue["msg"])
                for issue in error.errors()
            )
        ) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    return loaded


def _describe(prefix: str, loc: tuple[int | str, ...], value: object, problem: str) -> str:
    if not loc:
        return problem
    name = str(loc[0])
    return f"--{name.replace('_', '-')} ({prefix}{name.upper()}) is {value!r}: {problem}"


def exit_on_bad_settings(
    settings: type[SettingsT], argv: Sequence[str], environ: Mapping[str, str], program: str
) -> SettingsT:
    """`load` for a `main`: prints the problem and exits with 2, as for a wrong flag."""
    try:
        return load(settings, argv, environ, program)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
