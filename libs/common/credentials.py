"""What a process proves itself with, and trusts others by: files that may change while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from libs.common import logs

log = logs.get(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


class Pem(NamedTuple):
    """What certificate files hold; None for a file that there is none of."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files. Without a CA the system's are trusted; without the other two nothing is shown."""

    ca: Path | None = None
    """Signs the certificates of those we talk to."""
    certificate: Path | None = None
    """Ours, and what it is signed with."""
    key: Path | None = None

    def client_context(self) -> ssl.SSLContext:
        """For connections that we open. Raises ValueError naming the file that can't be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # SSLError is one.
            raise ValueError(f"{self.ca} has no CA certificates: {_problem(error)}") from error
        if self.certificate is not None:
            # A key with a passphrase would be asked for at the terminal.
            password = _no_passphrase
            try:
                context.load_cert_chain(self.certificate, self.key, password)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.certificate} and {self.key} are not a certificate and its key: "
                    f"{_problem(error)}"
                ) from error
        return context

    def read(self) -> Pem:
        """Raises ValueError naming a file that can't be used."""
        for path in self._paths():
            try:
                path.open("rb").close()
            except OSError as error:
                raise ValueError(f"can't read {path}: {error.strerror}") from error
        self.client_context()
        try:
            contents = [
                path.read_bytes() if path else None
                for path in (self.ca, self.certificate, self.key)
            ]
        except OSError as error:
            raise ValueError(f"can't read {error.filename}: {error.strerror}") from error
        return Pem(*contents)

    def stamp(self) -> _Stamp:
        """Another one when the files are others. Raises OSError."""
        stats = (path.stat() for path in self._paths())
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def _paths(self) -> Iterator[Path]:
        return (path for path in (self.ca, self.certificate, self.key) if path is not None)


class FollowedCertificates:
    """The contents of files that are replaced now and then, read anew when they are.

    Cheap enough to ask for every connection. May be asked from any one thread at a time.
    """

    def __init__(self, files: CertificateFiles) -> None:
        """Raises ValueError naming a file that can't be used."""
        self._files = files
        self._stamp: _Stamp | None = None
        self._pem = files.read()
        self.version = 1
        """Counts the contents that there have been."""

    def latest(self) -> Pem:
        """What the files hold, or held before while they can't be used, as when they are just being
        replaced."""
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return self._pem
            pem = self._files.read()
            if self._files.stamp() != stamp:
                return self._pem
        except (OSError, ValueError) as error:
            log.error("certificates not read", error=str(error))
            return self._pem
        if pem != self._pem:
            self.version += 1
            log.info("certificates changed", certificate=str(self._files.certificate))
        self._stamp, self._pem = stamp, pem
        return pem


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """How a process is let in by etcd or NATS. Files are read anew for each connection."""

    certificates: CertificateFiles = CertificateFiles()
    """For connections with TLS, which the server's URL asks for."""
    username: str = ""
    password_file: Path | None = None
    token_file: Path | None = None
    """For NATS, in place of user and password."""

    def password(self) -> str:
        """Empty without a file. Raises ValueError when it can't be read."""
        return secret_in(self.password_file) if self.password_file else ""

    def token(self) -> str:
        """Empty without a file. Raises ValueError when it can't be read."""
        return secret_in(self.token_file) if self.token_file else ""


def secret_in(path: Path) -> str:
    """A file's only line. Raises ValueError naming a file that can't be used."""
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text") from error
    if not secret or len(secret.splitlines()) > 1:
        raise ValueError(f"{path} does not hold one line")
    return secret


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _problem(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
