"""Asking a server whether it is ready; in containers `python -m deploy.local.probe KIND TARGET`.

A file of its own, with nothing of the rest of the repository.
"""

import argparse
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, assert_never

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import BaseModel, ConfigDict

_TIMEOUT_SECONDS = 1.0


class ProbeTls(BaseModel):
    """What a server is shown, and what it is to be. PEM files."""

    model_config = ConfigDict(frozen=True)

    ca: Path
    certificate: Path
    key: Path
    name: str
    """In the server's certificate."""


class Probe(BaseModel):
    """One question. It passes when the answer is what a ready server says.

    * `grpc`: the standard health service at `target` (host:port) says SERVING.
    * `http`: a GET of `target` (a URL) answers 200, with `contains` somewhere in the body.
    * `nats`: a TCP connection to `target` is greeted as NATS does.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["grpc", "http", "nats"]
    target: str
    contains: str = ""
    service: str = ""
    """Whose health is asked for, of `grpc`; empty for the whole server's."""
    tls: ProbeTls | None = None
    """Of `grpc`; None without TLS."""

    def failure(self) -> str | None:
        """Why it is not ready, in a few words; None when it is. Takes a second at most."""
        match self.kind:
            case "grpc":
                return _grpc_failure(self.target, self.service, self.tls)
            case "http":
                return _http_failure(self.target, self.contains)
            case "nats":
                return _nats_failure(self.target)
        assert_never(self.kind)


def _channel(target: str, tls: ProbeTls | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(target)
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
    )
    options = [("grpc.ssl_target_name_override", tls.name)]
    return grpc.secure_channel(target, credentials, options=options)


def _grpc_failure(target: str, service: str, tls: ProbeTls | None) -> str | None:
    try:
        channel = _channel(target, tls)
    except OSError as error:
        return f"gRPC health: {error}"
    with channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            return f"gRPC health: {error.code().name}"
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        return f"gRPC health: {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"
    return None


def _http_failure(url: str, contains: str) -> str | None:
    # A proxy configured for this machine has no part in reaching a local server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_SECONDS) as response:
            body = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return f"GET {url}: {error.code}"
    except OSError as error:
        return f"GET {url}: {getattr(error, 'reason', error)}"
    return None if contains in body else f"GET {url}: no {contains!r} yet"


def _nats_failure(target: str) -> str | None:
    host, port = target.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_SECONDS) as connection:
            greeting = connection.recv(4)
    except OSError as error:
        return f"NATS: {error.strerror or error}"
    return None if greeting == b"INFO" else "NATS: no greeting"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m deploy.local.probe")
    parser.add_argument("kind")
    parser.add_argument("target")
    parser.add_argument("--service", default="")
    parser.add_argument(
        "--tls", nargs=4, metavar=("CA", "CERTIFICATE", "KEY", "NAME"), help="files, and who it is"
    )
    asked = vars(parser.parse_args())
    if asked["tls"]:
        asked["tls"] = dict(zip(ProbeTls.model_fields, asked["tls"], strict=True))
    sys.exit(Probe.model_validate(asked).failure())
