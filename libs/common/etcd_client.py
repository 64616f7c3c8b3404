"""aetcd's client with what it lacks: TLS, and a telling error for a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

import aetcd
import grpc
from aetcd import exceptions, rpc, watcher

from libs.common.credentials import ServerAccess
from libs.common.errors import CredentialsRefused

_REFUSALS = (
    # As etcd words them.
    "authentication failed",
    "user name is empty",
    "invalid auth token",
    "permission denied",
    # As gRPC does: one of the two does not trust the other's certificate.
    "Tls handshake failed",
    "verification check failed",
)


class EtcdClient(aetcd.Client):  # type: ignore[misc]
    """Reads certificates and password when it connects."""

    def __init__(
        self, url: str, access: ServerAccess, timeout_seconds: int, options: Mapping[str, int]
    ) -> None:
        """Does not connect yet. `url` is http://host:port, or https for TLS."""
        parts = urlsplit(url)
        self._is_encrypted = parts.scheme == "https"
        self._access = access
        super().__init__(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 2379,
            timeout=timeout_seconds,
            options=dict(options),
        )

    async def connect(self) -> None:
        """In place of aetcd's own, which knows no TLS. Raises aetcd.ClientError, and ValueError
        naming a file that can't be used."""
        if self._connected.is_set():
            return
        self.channel = self._open_channel()
        if self._access.username:
            request = rpc.AuthenticateRequest(
                name=self._access.username, password=self._access.password()
            )
            try:
                answer = await rpc.AuthStub(self.channel).Authenticate(
                    request, timeout=self._timeout
                )
            except grpc.aio.AioRpcError as error:
                exceptions._handle_exception(error)
            self.metadata = (("token", answer.token),)
        self.kvstub = rpc.KVStub(self.channel)
        self.leasestub = rpc.LeaseStub(self.channel)
        self._watcher = watcher.Watcher(
            rpc.WatchStub(self.channel), timeout=self._timeout, metadata=self.metadata
        )
        self._connected.set()

    def _open_channel(self) -> grpc.aio.Channel:
        target, options = f"{self._host}:{self._port}", list(self._options.items())
        if not self._is_encrypted:
            return grpc.aio.insecure_channel(target, options=options)
        pem = self._access.certificates.read()
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
        return grpc.aio.secure_channel(target, credentials, options=options)


def as_refusal(url: str, error: Exception) -> CredentialsRefused | None:
    """The error to show when it was etcd, or our own check of it, that said no; None when it is
    another failure, such as that etcd is away."""
    text = str(error)
    if not isinstance(error, ValueError) and not any(refusal in text for refusal in _REFUSALS):
        return None
    return CredentialsRefused(f"etcd at {url} can't be used with these credentials: {text}")
