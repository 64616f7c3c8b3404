"""Asks a running router, for commands that show what it knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from deploy.local.cluster import ClusterError
from libs.common.channels import open_blocking
from libs.common.credentials import CertificateFiles
from switchgear.router.v1 import router_pb2_grpc

CALL_SECONDS = 5.0


@dataclass(frozen=True)
class RouterAt:
    """Where a router is, and what it is shown."""

    address: str
    """host:port of its gRPC services."""
    certificates: CertificateFiles | None = None
    """None without TLS."""


@contextmanager
def asking(name: str, at: RouterAt) -> Iterator[router_pb2_grpc.RouterServiceStub]:
    """A router's stub. Raises ClusterError when the router does not answer in the body."""
    with open_blocking(at.address, "router", at.certificates) as channel:
        try:
            yield router_pb2_grpc.RouterServiceStub(channel)
        except grpc.RpcError as error:
            raise ClusterError(f"{name} does not answer: {error.code().name}") from error
