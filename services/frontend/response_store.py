"""Responses that are kept, in a JetStream stream of NATS that all frontends share.

One message is one response with its whole conversation, so that going on with it takes one read and
needs none of the responses before it. NATS itself keeps to the bounds: the oldest messages leave
when there are too many, too many bytes, or when their time is over.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, RawStreamMsg, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from libs.common import logs
from libs.common.errors import ResponsesUnavailable
from libs.common.nats_client import connecting, connection_number
from services.frontend.config import FrontendSettings

log = logs.get(__name__)

CALL_SECONDS = 2.0
MAX_CALLS = 64
"""At the same time; each may hold a whole response. Beyond them callers are sent away."""

RETRY_SECONDS = 1.0
DUPLICATES_SECONDS = 120.0
"""NATS's own default for a window that is not used here, and must not exceed a message's life."""

_RESPONSE_ID = re.compile(r"resp-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """What may be kept at most."""

    total_bytes: int
    responses: int
    seconds: float
    response_bytes: int
    """Of one response with its conversation."""


class ResponseStore:
    """Keeps responses by tenant and id. All calls raise ResponsesUnavailable when NATS, or room for
    the call, is not to be had, after CALL_SECONDS at most."""

    def __init__(self, client: Client, namespace: str, limits: StoreLimits) -> None:
        self.limits = limits
        self._client = client
        self._jetstream = client.jetstream(timeout=CALL_SECONDS)
        self._stream = f"switchgear_{namespace}_responses"
        self._prefix = f"switchgear.v1.{namespace}.responses"
        self._calls = 0
        self._prepared_connection = 0
        """The connection over which the stream was last seen to be as it should."""

    async def check(self) -> None:
        """Returns when the store is there and could take a response just now."""
        async with self._call():
            await self._prepare()

    async def get(self, tenant: str, response_id: str) -> bytes | None:
        """What was put under this id by this tenant, if it is still kept."""
        message = await self._find(tenant, response_id)
        return None if message is None else message.data or b""

    async def put(self, tenant: str, response_id: str, value: bytes) -> None:
        """Keeps a value of `limits.response_bytes` at most. It has been written when this returns:
        any frontend finds it from now on."""
        async with self._call():
            await self._prepare_once()
            await self._jetstream.publish(self._subject(tenant, response_id), value)

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was something to delete."""
        message = await self._find(tenant, response_id)
        if message is None or message.seq is None:
            return False
        async with self._call():
            try:
                return await self._jetstream.delete_msg(self._stream, message.seq)
            except NotFoundError:
                return False

    async def _find(self, tenant: str, response_id: str) -> RawStreamMsg | None:
        if not _RESPONSE_ID.fullmatch(response_id):  # Nor may it say what to look for in NATS.
            return None
        async with self._call():
            await self._prepare_once()
            try:
                # From the stream's leader: copies may not have heard yet of what was put just now.
                return await self._jetstream.get_last_msg(
                    self._stream, self._subject(tenant, response_id)
                )
            except NotFoundError:
                return None

    def _subject(self, tenant: str, response_id: str) -> str:
        """A tenant's name may have any characters, and subjects may not."""
        owner = hashlib.sha256(tenant.encode()).hexdigest()[:32]
        return f"{self._prefix}.{owner}.{response_id}"

    async def _prepare_once(self) -> None:
        """A server that comes back may have lost the stream, so it is looked for after that."""
        if connection_number(self._client) != self._prepared_connection:
            await self._prepare()

    async def _prepare(self) -> None:
        """Makes the stream, or gives it these limits. What else an operator has changed about it,
        such as its replicas, stays."""
        connection = connection_number(self._client)
        limits = self.limits
        wanted = {
            "max_bytes": limits.total_bytes,
            "max_msgs": limits.responses,
            "max_age": limits.seconds,
            "max_msg_size": limits.response_bytes,
            "duplicate_window": min(DUPLICATES_SECONDS, limits.seconds),
        }
        try:
            found = (await self._jetstream.stream_info(self._stream)).config
        except NotFoundError:
            await self._jetstream.add_stream(
                StreamConfig(
                    name=self._stream,
                    subjects=[f"{self._prefix}.>"],
                    storage=StorageType.FILE,
                    discard=DiscardPolicy.OLD,
                ).evolve(**wanted)
            )
            log.info("store of responses made", stream=self._stream)
        else:
            if any(getattr(found, name) != value for name, value in wanted.items()):
                await self._jetstream.update_stream(found.evolve(**wanted))
                log.info("store of responses has other limits", stream=self._stream)
        self._prepared_connection = connection

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        if self._calls >= MAX_CALLS:
            raise _unavailable("too many are being read and written")
        if not self._client.is_connected:
            raise _unavailable("their store can't be reached")
        self._calls += 1
        try:
            async with asyncio.timeout(CALL_SECONDS):
                yield
        except (NatsError, TimeoutError) as error:
            # The stream may be gone, too, and is looked for again.
            self._prepared_connection = 0
            log.warning("store of responses not reached", error=f"{type(error).__name__}: {error}")
            raise _unavailable("their store can't be reached") from error
        finally:
            self._calls -= 1


def _unavailable(why: str) -> ResponsesUnavailable:
    return ResponsesUnavailable(
        f"stored responses are not to be had just now: {why}", retry_after_seconds=RETRY_SECONDS
    )


@asynccontextmanager
async def response_store(settings: FrontendSettings) -> AsyncIterator[ResponseStore | None]:
    """The store that the settings ask for, while the body runs; None where nothing is kept."""
    if settings.response_store == "none":
        yield None
        return
    limits = StoreLimits(
        total_bytes=settings.stored_responses_bytes,
        responses=settings.stored_responses,
        seconds=settings.stored_response_seconds,
        response_bytes=settings.stored_response_bytes,
    )
    name = settings.name or "frontend"
    async with connecting(settings.nats_url, name, settings.nats_access) as client:
        yield ResponseStore(client, settings.namespace, limits)
