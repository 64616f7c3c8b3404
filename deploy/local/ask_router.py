"""Asks a running router, for commands that show what it knows."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from deploy.local.cluster import ClusterError
from switchgear.router.v1 import router_pb2_grpc

CALL_SECONDS = 5.0


@contextmanager
def asking(name: str, address: str) -> Iterator[router_pb2_grpc.RouterServiceStub]:
    """A router's stub. Raises ClusterError when the router does not answer in the body."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield router_pb2_grpc.RouterServiceStub(channel)
        except grpc.RpcError as error:
            raise ClusterError(f"{name} does not answer: {error.code().name}") from error
