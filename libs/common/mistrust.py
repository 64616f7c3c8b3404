"""What is wrong between two certificates, when a connection does not come about.

gRPC tells a peer with a wrong certificate from one that is away only in its details, whose words
change. A handshake of our own tells them apart, and says whose certificate it is, and what is wrong
with it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client import Counter

from libs.common import logs
from libs.common.credentials import CertificateFiles
from libs.common.metrics import count_from_zero

log = logs.get(__name__)

HANDSHAKE_SECONDS = 3.0
LOOK_AGAIN_SECONDS = 10.0
"""An address that stays wrong is looked at, logged and counted so often at most."""


_OTHER_NAME = (62, 64)
"""OpenSSL's codes for a certificate of another host name, or IP address."""


class Problem(StrEnum):
    """What stands in the way of a connection."""

    PEER_UNTRUSTED = "peer_untrusted"
    """The peer's certificate is not of our CA, or not valid now."""
    PEER_NAME = "peer_name"
    """The peer's certificate is good, and another's: it is not the service that is expected."""
    OWN_REFUSED = "own_refused"
    """The peer takes none of ours, or not this one."""
    OWN_NAME = "own_name"
    """Ours is good, and of a service that the peer takes no calls from."""
    NO_TLS = "no_tls"
    """The peer does not speak TLS."""


UNTRUSTED = Counter(
    "switchgear_untrusted_connections",
    "Connections to a peer (a component, etcd or nats) that a certificate stood in the way of.",
    ["peer", "problem"],
)


@dataclass(frozen=True, slots=True)
class Mistrust:
    """Why two processes do not trust each other."""

    problem: Problem
    details: str
    """Whose certificate is wrong, and how, for people."""


class FailedConnections:
    """Looks into connections that failed, in tasks of its own, and says in the log and in a metric
    when a certificate was the reason.

    There is one look at a time at an address, and each ends by itself within HANDSHAKE_SECONDS.
    """

    def __init__(self, certificates: CertificateFiles, peers: Iterable[str]) -> None:
        """What we show and whom we trust; and all peers there may be, for the metric."""
        self._certificates = certificates
        count_from_zero(UNTRUSTED, peers, Problem)
        self._looked_at_seconds: dict[str, float] = {}
        self._looking: set[asyncio.Task[None]] = set()

    def look_into(self, peer: str, address: str, expected_name: str) -> None:
        """Looks why there is no connection to a peer (a component, etcd or nats) at host:port,
        unless that was done just before. Returns at once."""
        if self._is_due(address):
            look = asyncio.create_task(
                self.look(peer, address, expected_name), name=f"look into {address}"
            )
            self._looking.add(look)
            look.add_done_callback(self._looking.discard)

    async def look(self, peer: str, address: str, expected_name: str) -> None:
        """The same, at once and to its end, for who is about to give up."""
        found = await find_mistrust(address, expected_name, self._certificates)
        if found is not None:
            _report(peer, address, found)

    def found(self, peer: str, address: str, mistrust: Mistrust) -> None:
        """Says what is known already, unless that was done just before."""
        if self._is_due(address):
            _report(peer, address, mistrust)

    def _is_due(self, address: str) -> bool:
        now = asyncio.get_running_loop().time()
        recent = now - LOOK_AGAIN_SECONDS
        self._looked_at_seconds = {
            one: when for one, when in self._looked_at_seconds.items() if when > recent
        }
        if address in self._looked_at_seconds:
            return False
        self._looked_at_seconds[address] = now
        return True


def _report(peer: str, address: str, found: Mistrust) -> None:
    UNTRUSTED.labels(peer, found.problem).inc()
    log.error(
        "connection not trusted",
        peer=peer,
        address=address,
        problem=found.problem.value,
        details=found.details,
    )


async def find_mistrust(
    address: str, expected_name: str, certificates: CertificateFiles
) -> Mistrust | None:
    """Tries a handshake with who listens at host:port, speaks HTTP/2 and should have a certificate
    of that name, or IP address. None when the handshake is well, or nobody is there."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            return await _handshake(address, expected_name, certificates)
    except ssl.SSLError as error:
        return mistrust_of(error, certificates)
    except (OSError, ValueError):
        # Nobody is there, which includes a timeout; or our own files can't be read, which is said
        # where they are read.
        return None


def mistrust_of(error: ssl.SSLError, certificates: CertificateFiles) -> Mistrust:
    """What a failed handshake of Python's own says."""
    if isinstance(error, ssl.SSLCertVerificationError):
        is_other_name = error.verify_code in _OTHER_NAME
        return Mistrust(
            Problem.PEER_NAME if is_other_name else Problem.PEER_UNTRUSTED,
            f"the peer's certificate fails against {certificates.ca or 'the system'}: "
            f"{error.verify_message}",
        )
    reason = error.reason or str(error)
    if "ALERT" in reason:
        return _refused(certificates, reason)
    return Mistrust(Problem.NO_TLS, f"the peer does not speak TLS: {reason}")


async def _handshake(
    address: str, expected_name: str, certificates: CertificateFiles
) -> Mistrust | None:
    context = certificates.client_context()
    context.set_alpn_protocols(["h2"])
    context.check_hostname = False
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(
        host.strip("[]"), int(port), ssl=context, server_hostname=expected_name
    )
    try:
        names = _names(writer.get_extra_info("peercert"))
        if not any(_is_for(expected_name, name) for name in names):
            return Mistrust(
                Problem.PEER_NAME,
                f"the peer shows a certificate of {', '.join(names) or 'nobody'}, which is not "
                f"{expected_name}",
            )
        # Whether it takes ours is known when HTTP/2 begins, as it does at both ends. gRPC's servers
        # say nothing when they don't.
        return None if await reader.read(1) else _refused(certificates, "closed without a word")
    except ConnectionError as error:
        return _refused(certificates, str(error))
    finally:
        writer.transport.abort()


def _refused(certificates: CertificateFiles, reason: str) -> Mistrust:
    if certificates.certificate is None:
        return Mistrust(Problem.OWN_REFUSED, f"the peer wants a certificate of ours: {reason}")
    return Mistrust(
        Problem.OWN_REFUSED,
        f"the peer does not trust {certificates.certificate}, or no longer: {reason}",
    )


def _is_for(expected_name: str, name: str) -> bool:
    if name.startswith("*."):
        return expected_name.partition(".")[2] == name[2:]
    return expected_name == name


def _names(certificate: dict[str, Any]) -> list[str]:
    return [name for _, name in certificate.get("subjectAltName", ())]
