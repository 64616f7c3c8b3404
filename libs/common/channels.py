"""Channels to other services: the one place that decides how they are encrypted, and to whom."""

from __future__ import annotations

import grpc

from libs.common.credentials import CertificateFiles, FollowedCertificates, Pem
from libs.common.grpc_server import CHANNEL_OPTIONS
from libs.common.identity import certificate_name


class Channels:
    """Opens channels, with TLS when there are certificates.

    A channel shows the certificate that there was when it was opened, also when it connects again.
    Who keeps one for long opens another when `version` has changed.
    """

    def __init__(self, certificates: CertificateFiles | None = None) -> None:
        """Raises ValueError naming a file that can't be used."""
        self._certificates = FollowedCertificates(certificates) if certificates else None

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
