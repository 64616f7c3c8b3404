"""API keys: what one looks like, how it is stored, and what it allows."""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.frontend.core.rate_limits import Limits
from switchgear.access.v1 import access_pb2

SECRET_BYTES = 32

_PREFIX = "sk-switchgear-"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadApiKey(ValueError):
    """A stored key can't be used. The text names the key and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored key, checked."""

    key_id: str
    digest: bytes
    """Of the key itself; see `digest_of`."""
    tenant: str
    models: frozenset[str] = frozenset()
    """Names or aliases; empty allows all."""
    limits: Limits = field(default_factory=Limits)
    priority: int = 0
    """The best its requests may have; lower ones are run first."""
    steers_routing: bool = False
    """Whether its requests may name policies and workers."""


def new_key(secret: bytes) -> str:
    """The key itself, as its holder gets it. `secret` is random and SECRET_BYTES long."""
    assert len(secret) == SECRET_BYTES
    return _PREFIX + urlsafe_b64encode(secret).rstrip(b"=").decode()


def digest_of(key: str) -> bytes:
    """What is stored of a key, and what it is looked up by.

    Looking up a digest in a table tells nothing by the time it takes: whoever can choose a
    digest's first bytes at will has broken SHA-256.
    """
    return hashlib.sha256(key.encode()).digest()


def api_key_of(message: access_pb2.ApiKey) -> ApiKey:
    """Raises BadApiKey."""
    for name in ("key_id", "tenant"):
        value = getattr(message, name)
        if not _NAME.fullmatch(value):
            raise BadApiKey(
                f"API key {message.key_id!r}: {name} is {value!r}, not 1 to 100 letters, "
                "digits, '-', '_' or '.'"
            )
    if not _SHA256.fullmatch(message.key_sha256):
        raise BadApiKey(f"API key {message.key_id!r}: key_sha256 is not 64 lower-case hex digits")
    return ApiKey(
        key_id=message.key_id,
        digest=bytes.fromhex(message.key_sha256),
        tenant=message.tenant,
        models=frozenset(message.models),
        limits=Limits(
            concurrent_requests=message.concurrent_requests,
            requests_per_minute=message.requests_per_minute,
            tokens_per_minute=message.tokens_per_minute,
        ),
        priority=message.priority,
        steers_routing=message.steers_routing,
    )


def api_keys_of(messages: Iterable[access_pb2.ApiKey]) -> list[ApiKey]:
    """All keys of a file. Raises BadApiKey, also for an id or a key that is there twice."""
    keys = [api_key_of(message) for message in messages]
    seen: set[str | bytes] = set()
    for key in keys:
        if key.key_id in seen or key.digest in seen:
            raise BadApiKey(f"API key {key.key_id!r} is there twice")
        seen |= {key.key_id, key.digest}
    return keys
