"""Who asks, and whether they may. Without API keys everyone may do everything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from libs.common.errors import (
    NoLiveInstance,
    RequestsLimited,
    RoutingNotAllowed,
    SwitchgearError,
    TokensLimited,
    Unauthenticated,
)
from services.frontend.core.api_keys import ApiKey, digest_of
from services.frontend.core.rate_limits import Refusal, Remaining, Usage
from switchgear.common.v1 import routing_pb2


class Reservation:
    """Tokens that one request may use. Settled once, when it is known how many it did."""

    def __init__(self, usage: Usage, tokens: int, clock: Callable[[], float]) -> None:
        self._usage = usage
        self._tokens = tokens
        self._clock = clock

    def settle(self, used: int) -> None:
        self._usage.settle(self._tokens, used, self._clock())


class Caller:
    """Someone without a key, where none is asked for: no limits, nothing counted."""

    key_id = ""
    tenant = ""
    """Whose responses are kept together; no key's tenant is empty."""

    def may_use(self, *names: str) -> bool:
        """Whether the model of these names, its own and an alias, is allowed."""
        return True

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request, and a place for it while the body runs. Raises RequestsLimited, or
        TokensLimited for a caller in debt."""
        yield

    def reserve(self, tokens: int) -> Reservation | None:
        """Takes tokens that the request may use. Raises TokensLimited."""
        return None

    def cache_salt(self, asked: str = "") -> str:
        """What a request's cached blocks are salted with, from what the caller asks for."""
        return asked

    def priority(self, asked: int) -> int:
        """What a request gets that asks for this priority; lower ones are run first."""
        return asked

    def routing(
        self, asked: routing_pb2.RoutingOptions | None
    ) -> routing_pb2.RoutingOptions | None:
        """How a request is routed that asks for this. Raises RoutingNotAllowed."""
        return asked

    def rate_headers(self) -> list[tuple[bytes, bytes]]:
        """What is left of the limits, as OpenAI tells it."""
        return []


ANYONE = Caller()


class KeyHolder(Caller):
    """The holder of one API key; all its requests share this."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.key_id = key.key_id
        self.key = key
        self.tenant = key.tenant
        self._clock = clock
        self._usage = Usage(key.limits, clock())

    def change(self, key: ApiKey) -> None:
        """Another version of the same key. What has been used stays used."""
        if key != self.key:
            self.key = key
            self.tenant = key.tenant
            self._usage.set_limits(key.limits, self._clock())

    def may_use(self, *names: str) -> bool:
        models = self.key.models
        return not models or not models.isdisjoint(names)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        if refusal := self._usage.admit(self._clock()):
            raise _error_of(refusal)
        try:
            yield
        finally:
            self._usage.leave()

    def reserve(self, tokens: int) -> Reservation | None:
        if refusal := self._usage.reserve(tokens, self._clock()):
            raise _error_of(refusal)
        return Reservation(self._usage, tokens, self._clock)

    def cache_salt(self, asked: str = "") -> str:
        # A tenant's name has no slash, so that no choice of salt reaches into another tenant.
        return f"{self.key.tenant}/{asked}"

    def priority(self, asked: int) -> int:
        return max(asked, self.key.priority)

    def routing(
        self, asked: routing_pb2.RoutingOptions | None
    ) -> routing_pb2.RoutingOptions | None:
        if asked is None:
            return None
        session = routing_pb2.RoutingOptions(session_id=asked.session_id)
        if asked != session and not self.key.steers_routing:
            raise RoutingNotAllowed("this API key may not choose policies or workers")
        given = routing_pb2.RoutingOptions()
        given.CopyFrom(asked)
        if asked.session_id:
            # As with the salt: a tenant's sessions are its own.
            given.session_id = f"{self.key.tenant}/{asked.session_id}"
        return given

    def rate_headers(self) -> list[tuple[bytes, bytes]]:
        now = self._clock()
        return [
            *_headers(b"requests", self._usage.remaining_requests(now)),
            *_headers(b"tokens", self._usage.remaining_tokens(now)),
        ]


class Access:
    """Finds the caller of a request."""

    def __init__(self, *, is_open: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Without `is_open` nobody gets in before `set_keys`."""
        self.is_open = is_open
        self._clock = clock
        self._by_digest: dict[bytes, KeyHolder] | None = None

    def set_keys(self, keys: Iterable[ApiKey]) -> None:
        """Replaces all keys. Running requests of a key that is gone go on."""
        known = {holder.key_id: holder for holder in (self._by_digest or {}).values()}
        holders = {}
        for key in keys:
            holder = known.get(key.key_id) or KeyHolder(key, self._clock)
            holder.change(key)
            holders[key.digest] = holder
        self._by_digest = holders

    def caller(self, authorization: str) -> Caller:
        """Who sent this `authorization`; empty when there was none.

        Raises Unauthenticated, and NoLiveInstance before any keys have been read.
        """
        if self.is_open:
            return ANYONE
        if self._by_digest is None:
            raise NoLiveInstance("the API keys have not been read yet", retry_after_seconds=1)
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated(
                "You didn't provide an API key. Send it in the header Authorization: Bearer KEY"
            )
        holder = self._by_digest.get(digest_of(key.strip()))
        if holder is None:
            raise Unauthenticated("Incorrect API key provided")
        return holder


def _error_of(refusal: Refusal) -> SwitchgearError:
    error_class = TokensLimited if refusal.limited == "tokens" else RequestsLimited
    unit = "" if refusal.limited == "concurrent requests" else " per min"
    return error_class(
        f"Rate limit reached on {refusal.limited}{unit}: Limit {refusal.limit}, "
        f"Requested {refusal.wanted}. Please try again in {refusal.retry_after_seconds:.3g} s",
        retry_after_seconds=refusal.retry_after_seconds,
    )


def _headers(kind: bytes, left: Remaining | None) -> list[tuple[bytes, bytes]]:
    if left is None:
        return []
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % left.limit),
        (b"x-ratelimit-remaining-" + kind, b"%d" % left.remaining),
        (b"x-ratelimit-reset-" + kind, duration_text(left.reset_seconds).encode()),
    ]


def duration_text(seconds: float) -> str:
    """As OpenAI writes durations in headers: 20ms, 1s, 6m0s. Rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
