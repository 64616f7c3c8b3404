"""Channels to other services: the one place that decides how they are encrypted, and to whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from libs.common.credentials import CertificateFiles, FollowedCertificates, Pem
from libs.common.grpc_errors import typed
from libs.common.grpc_server import CHANNEL_OPTIONS
from libs.common.identity import WORKER, certificate_name
from libs.common.mistrust import FailedConnections, Mistrust, Problem

_SERVERS = ("router", "kv_indexer", WORKER)
"""Who is called by services."""


class Channels:
    """Opens channels, with TLS when there are certificates.

    A channel shows the certificate that there was when it was opened, also when it connects again.
    Who keeps one for long opens another when `version` has changed.
    """

    def __init__(self, certificates: CertificateFiles | None = None) -> None:
        """Raises ValueError naming a file that can't be used."""
        self._certificates = FollowedCertificates(certificates) if certificates else None
        self._failed = FailedConnections(certificates, _SERVERS) if certificates else None

    @property
    def version(self) -> int:
        """Another one when channels would be opened with another certificate."""
        if self._certificates is None:
            return 0
        self._certificates.latest()
        return self._certificates.version

    def open(self, address: str, component: str) -> grpc.aio.Channel:
        """A channel to host:port, where a process of that component is expected. With TLS nobody
        else is spoken to: calls fail with UNAVAILABLE."""
        options = CHANNEL_OPTIONS
        if self._certificates is None:
            return grpc.aio.insecure_channel(address, options=options)
        pem = self._certificates.latest()
        return grpc.aio.secure_channel(
            address, _credentials(pem), options=[*options, _expecting(component)]
        )

    @asynccontextmanager
    async def calling(self, address: str, component: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel for the calls in the body, whose grpc errors become ours."""
        async with self.open(address, component) as channel:
            with typed():
                try:
                    yield channel
                except grpc.aio.AioRpcError as error:
                    self.failed(address, component, error)
                    raise

    def failed(
        self, address: str, component: str, error: grpc.aio.AioRpcError | None = None
    ) -> None:
        """To be told of a channel that does not connect, with what a call on it raised if there was
        one: with TLS it is looked into whether a certificate is the reason. Returns at once."""
        if self._failed is None:
            return
        code = grpc.StatusCode.UNAVAILABLE if error is None else error.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            self._failed.look_into(component, address, certificate_name(component))
        elif error is not None and code is grpc.StatusCode.PERMISSION_DENIED:
            refusal = Mistrust(Problem.OWN_NAME, error.details() or "")
            self._failed.found(component, address, refusal)


def open_blocking(
    address: str, component: str, certificates: CertificateFiles | None
) -> grpc.Channel:
    """A channel for programs without an event loop. Raises ValueError naming a file that can't be
    used."""
    if certificates is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(
        address,
        _credentials(certificates.read()),
        options=[*CHANNEL_OPTIONS, _expecting(component)],
    )


def _credentials(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


def _expecting(component: str) -> tuple[str, str]:
    return "grpc.ssl_target_name_override", certificate_name(component)
