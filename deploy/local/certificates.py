"""A CA for development: certificates of all services, and what etcd and NATS ask passwords for.

In the folder, with everything secret readable by its owner alone:

    ca.crt ca.key                      the CA; kept when it is there already
    router.crt router.key ...          for each service, etcd, nats, envoy, and `client` for tools
    etcd.password etcd_root.password   of the user `switchgear` and of etcd's `root`
    nats.password nats.conf            of the user `switchgear`, and what makes NATS ask for it
"""

import ipaddress
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from libs.common.credentials import CertificateFiles, ServerAccess
from libs.common.identity import CLIENT, DOMAIN, certificate_name

SERVICES = ("frontend", "router", "kv_indexer", "prefill_worker", "decode_worker")
SERVERS = ("etcd", "nats")
ENVOY = "envoy"
USERNAME = "switchgear"

CA_DAYS = 3650
CERTIFICATE_DAYS = 90

_THIS_MACHINE = ("localhost", "127.0.0.1")
_REACHED_BY_ADDRESS = frozenset({"frontend", ENVOY, *SERVERS})
"""Others than our own services look for the host's name or address in these certificates."""
_CLOCKS_DIFFER = timedelta(minutes=5)


def files_of(folder: Path, name: str) -> CertificateFiles:
    """What a service, or `client`, is to be given of the folder."""
    return CertificateFiles(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")


def access_to(server: str, folder: Path) -> ServerAccess:
    """How tools of this machine are let in by etcd or NATS."""
    return ServerAccess(files_of(folder, CLIENT), USERNAME, folder / f"{server}.password")


def make(folder: Path, hosts: Sequence[str] = (), days: int = CERTIFICATE_DAYS) -> None:
    """Makes all files. `hosts` are further names and addresses of the frontend, Envoy, etcd and
    NATS. Again in the same folder, it makes other certificates of the same CA.

    Raises OSError, and ValueError for a CA in the folder that can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca = _existing_ca(folder) or _new_ca(folder)
    for component in (*SERVICES, *SERVERS, ENVOY, CLIENT):
        names = [certificate_name(component)]
        if component in _REACHED_BY_ADDRESS:
            names += [component, *_THIS_MACHINE, *hosts]
        _write_pair(folder, component, _issued(ca, names, days))
    for name in (*SERVERS, "etcd_root"):
        if not (folder / f"{name}.password").exists():
            _write(folder / f"{name}.password", secrets.token_urlsafe(24).encode())
    _write(folder / "nats.conf", _nats_configuration(folder).encode())


def _nats_configuration(folder: Path) -> str:
    """What a NATS server must be told; in its own format, of which JSON is a part."""
    folder = folder.absolute()
    return json.dumps(
        {
            "tls": {
                "ca_file": str(folder / "ca.crt"),
                "cert_file": str(folder / "nats.crt"),
                "key_file": str(folder / "nats.key"),
                "verify": True,
            },
            "authorization": {
                "user": USERNAME,
                "password": (folder / "nats.password").read_text(),
            },
        },
        indent=2,
    )


@dataclass(frozen=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _existing_ca(folder: Path) -> _Pair | None:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"the CA in {folder} can't be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{folder / 'ca.key'} is not a key of an elliptic curve")
    return _Pair(certificate, key)


def _new_ca(folder: Path) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{DOMAIN} development CA")])
    only_signs = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(only_signs, critical=True)
        .sign(key, hashes.SHA256())
    )
    pair = _Pair(certificate, key)
    _write_pair(folder, "ca", pair)
    return pair


def _issued(ca: _Pair, names: Sequence[str], days: int) -> _Pair:
    """For both ends of a connection, since every service calls and is called."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    certificate = (
        _builder(subject, ca.certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_general(names)), critical=False)
        .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    return _Pair(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general(names: Iterable[str]) -> list[x509.GeneralName]:
    general: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            general.append(x509.DNSName(name))
    return general


def _write_pair(folder: Path, name: str, pair: _Pair) -> None:
    key = pair.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate = pair.certificate.public_bytes(serialization.Encoding.PEM)
    _write(folder / f"{name}.key", key)
    _write(folder / f"{name}.crt", certificate, mode=0o644)


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """At once, so that nobody reads half of it."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(unfinished, mode)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
