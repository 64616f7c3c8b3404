"""Asking a server whether it is ready; in containers `python -m deploy.local.probe KIND TARGET`."""

import socket
import sys
import urllib.error
import urllib.request
from typing import Literal, assert_never

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import BaseModel, ConfigDict

_TIMEOUT_SECONDS = 1.0


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

    def failure(self) -> str | None:
        """Why it is not ready, in a few words; None when it is. Takes a second at most."""
        match self.kind:
            case "grpc":
                return _grpc_failure(self.target)
            case "http":
                return _http_failure(self.target, self.contains)
            case "nats":
                return _nats_failure(self.target)
        assert_never(self.kind)


def _grpc_failure(target: str) -> str | None:
    with grpc.insecure_channel(target) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS
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
    _, kind, target = sys.argv
    sys.exit(Probe.model_validate({"kind": kind, "target": target}).failure())
