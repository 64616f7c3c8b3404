"""Who is alive and what they serve, kept in etcd under leases.

Registering and watching both go on for ever: they start before etcd does if need be, and outlive
its restarts. Meanwhile everyone keeps what they last knew, since a worker does not stop serving
because etcd is away; who really is gone is noticed by the connection to it.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aetcd
from google.protobuf import json_format
from google.protobuf.message import Message

from libs.common import logs
from libs.common.credentials import ServerAccess
from libs.common.errors import NoLiveInstance
from libs.common.etcd_client import EtcdClient, as_refusal
from libs.common.mistrust import FailedConnections
from libs.common.outage import Outage
from libs.common.tasks import background
from switchgear.discovery.v1 import discovery_pb2

log = logs.get(__name__)

LEASE_SECONDS = 10
"""How long after a process's last sign of life others may still believe in it."""

KEEP_ALIVE_SECONDS = LEASE_SECONDS / 3
SILENT_SECONDS = 2
"""etcd answers sooner, unless something is wrong with it."""
CALL_SECONDS = 3
RETRY_SECONDS = 0.5

_OPTIONS = {
    # An idle watch sends nothing by itself: only pings tell that etcd's host is gone.
    # etcd takes one every 5 s at most.
    "grpc.keepalive_time_ms": 6_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.max_pings_without_data": 0,
    # Otherwise a peer that takes bytes and answers none is believed for a minute.
    "grpc.http2.ping_timeout_ms": 3_000,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1_000,
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
}

_FAILURES = (aetcd.ClientError, OSError, TimeoutError, ValueError)
"""etcd is away, refuses us, or a file that proves who we are can't be read just now."""

T = TypeVar("T", bound=Message)
Key = tuple[str, ...]
"""Path segments after the watched prefix."""


def new_instance_id() -> int:
    """A random 64-bit id, drawn once per process. Never 0, which means none."""
    return random.getrandbits(64) or 1


def component(role: discovery_pb2.Role.ValueType) -> str:
    """A role's name in keys, flags and process names, such as decode_worker."""
    return discovery_pb2.Role.Name(role).removeprefix("ROLE_").lower()


class Table(Generic[T]):
    """What is under a prefix, as last known. Changes only on the event loop."""

    def __init__(self) -> None:
        self.entries: dict[Key, T] = {}
        self.revision = 0
        """Of etcd, up to which it has been followed; 0 before it was first read."""
        self.was_read = asyncio.Event()
        """Set once etcd has been read in full."""
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls the listener after every change, from now on. It must not raise."""
        self._listeners.append(listener)

    def values(self) -> Iterable[T]:
        """All entries, in no order."""
        return self.entries.values()

    def replace(self, entries: dict[Key, T], revision: int = 0) -> None:
        """Sets everything at once, as a watcher or a test does."""
        changed = entries != self.entries
        self.entries = entries
        self.revision = max(revision, self.revision)
        self.was_read.set()
        if changed:
            for listener in self._listeners:
                listener()


_REGISTRATION = "registration"


class _Silence:
    """Whether etcd has answered of late. While it did not, nobody could keep a lease alive, so
    leases that end then, or soon after, say nothing about who holds them."""

    def __init__(self) -> None:
        self._has_begun = False
        """Of an etcd that never answered nothing is known that could be in doubt."""
        self._asked_at: float | None = None
        self._ended_at = -math.inf

    def asked(self, now: float) -> None:
        """A question goes out. Those before it may still be open."""
        if self._asked_at is None and self._has_begun:
            self._asked_at = now

    def answered(self, now: float) -> None:
        if self.is_on(now):
            self._ended_at = now
        self._has_begun = True
        self._asked_at = None

    def is_on(self, now: float) -> bool:
        return self._asked_at is not None and now - self._asked_at > SILENT_SECONDS

    def casts_doubt(self, now: float) -> bool:
        """On leases that end now."""
        return self.is_on(now) or now - self._ended_at < LEASE_SECONDS


class Discovery:
    """One namespace's keys in one etcd."""

    def __init__(self, etcd_url: str, namespace: str, access: ServerAccess | None = None) -> None:
        """Does not connect yet. `etcd_url` is http://host:port, or https for TLS."""
        self._url = etcd_url
        self._access = access or ServerAccess()
        self._root = f"/switchgear/v1/{namespace}/"
        self._silence = _Silence()
        self._outage = Outage()
        url = urlsplit(etcd_url)
        self._host = url.hostname or "127.0.0.1"
        self._address = f"{self._host}:{url.port or 2379}"
        self._failed = (
            FailedConnections(self._access.certificates, ["etcd"])
            if url.scheme == "https"
            else None
        )

    async def check_access(self) -> None:
        """Raises CredentialsRefused when etcd does not let us in. An etcd that is away may come
        later."""
        try:
            async with asyncio.timeout(CALL_SECONDS), self._client() as client:
                await client.get(self._root.encode())
        except _FAILURES as error:
            if (refusal := as_refusal(self._url, error)) is not None:
                if self._failed is not None:
                    await self._failed.look("etcd", self._address, self._host)
                raise refusal from error
            self._report(error)

    def _report(self, error: Exception, who: str | None = None) -> None:
        """Of someone who tries again it is said once in a while; else at once."""
        if self._failed is not None:
            self._failed.look_into("etcd", self._address, self._host)
        now = asyncio.get_running_loop().time()
        if who is not None and not self._outage.failed(who, now):
            return
        waiting = self._outage.waiting
        if (refusal := as_refusal(self._url, error)) is not None:
            log.error("etcd refuses", waiting=waiting, error=str(refusal))
        else:
            log.warning("etcd unavailable", url=self._url, waiting=waiting, error=repr(error))

    def _works(self, who: str) -> None:
        seconds = self._outage.worked(who, asyncio.get_running_loop().time())
        if seconds is not None:
            log.info("etcd available again", url=self._url, seconds=round(seconds, 1))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[aetcd.Client]:
        client = EtcdClient(self._url, self._access, CALL_SECONDS, _OPTIONS)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await client.connect()
            yield client
        finally:
            # A peer that is away must not hold up our own shutdown.
            with suppress(TimeoutError, aetcd.ClientError):
                async with asyncio.timeout(CALL_SECONDS):
                    await client.close()

    @asynccontextmanager
    async def registered(
        self, instance: discovery_pb2.Instance, cards: Iterable[discovery_pb2.ModelCard] = ()
    ) -> AsyncIterator[None]:
        """Keeps a process, and the models it serves, registered while the body runs.

        Returns at once; registering happens, and happens again, in the background. At the end the
        lease is revoked, so that others know at once.
        """
        instance_id = f"{instance.instance_id:016x}"
        keys = {f"instances/{component(instance.role)}/{instance_id}": _to_json(instance)}
        for card in cards:
            keys[f"models/{quote(card.model, safe='')}/{instance_id}"] = _to_json(card)
        async with background(self._keep_registered(keys)):
            yield

    async def _keep_registered(self, keys: Mapping[str, bytes]) -> None:
        time = asyncio.get_running_loop().time
        while True:
            try:
                self._silence.asked(time())
                async with self._client() as client:
                    lease = await client.lease(LEASE_SECONDS)
                    self._silence.answered(time())
                    self._works(_REGISTRATION)
                    try:
                        for key, value in keys.items():
                            await client.put((self._root + key).encode(), value, lease=lease)
                        log.info("registered", keys=sorted(keys))
                        await self._keep_alive(lease)
                        log.warning("lease lost", keys=sorted(keys))
                    except asyncio.CancelledError:
                        with suppress(aetcd.ClientError):
                            await lease.revoke()
                        raise
            except _FAILURES as error:
                self._report(error, _REGISTRATION)
            await asyncio.sleep(RETRY_SECONDS)

    async def _keep_alive(self, lease: aetcd.Lease) -> None:
        """Returns when etcd no longer knows the lease; raises when etcd can't be reached."""
        time = asyncio.get_running_loop().time
        while True:
            due_at = time() + KEEP_ALIVE_SECONDS
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            # If it was us who stood still, then so may have all others on this machine.
            self._silence.asked(due_at)
            refreshed = await lease.refresh()
            self._silence.answered(time())
            if refreshed.TTL <= 0:
                return

    async def put(self, key: str, message: Message) -> int:
        """Writes an entry that stays until it is deleted, such as "config/router/temperature".

        Returns the revision of the change, which tables come to have. Raises NoLiveInstance when
        etcd can't be reached, and CredentialsRefused, as `delete` and `read` do.
        """
        async with self._one_call() as client:
            written = await client.put((self._root + key).encode(), _to_json(message))
            return int(written.header.revision)

    async def delete(self, key: str) -> int:
        """Returns the revision of the change; 0 when there was no such entry."""
        async with self._one_call() as client:
            deleted = await client.delete((self._root + key).encode())
            return int(deleted.header.revision) if deleted else 0

    async def read(self, prefix: str, message: type[T]) -> dict[Key, T]:
        """What is under `prefix` now. Entries that can't be read are left out."""
        root = (self._root + prefix).encode()
        async with self._one_call() as client:
            found = await client.get_prefix(root)
        parsed = ((_key(root, item.key), _parse(item.key, item.value, message)) for item in found)
        return {key: value for key, value in parsed if value is not None}

    @asynccontextmanager
    async def _one_call(self) -> AsyncIterator[aetcd.Client]:
        try:
            async with asyncio.timeout(CALL_SECONDS), self._client() as client:
                yield client
        except _FAILURES as error:
            if (refusal := as_refusal(self._url, error)) is not None:
                raise refusal from error
            raise NoLiveInstance(f"etcd at {self._url} can't be reached: {error!r}") from error

    @asynccontextmanager
    async def watching(self, prefix: str, message: type[T]) -> AsyncIterator[Table[T]]:
        """A table of what is under `prefix` (such as "models/"), kept up to date while the body
        runs. Entries that can't be read are left out, with a log line."""
        table: Table[T] = Table()
        async with background(self._watch(prefix, message, table)):
            yield table

    async def _watch(self, prefix: str, message: type[T], table: Table[T]) -> None:
        while True:
            try:
                async with self._client() as client:
                    await self._follow(client, prefix, message, table)
            except _FAILURES as error:
                self._report(error, prefix)
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow(
        self, client: aetcd.Client, prefix: str, message: type[T], table: Table[T]
    ) -> None:
        """Reads everything, then follows changes. Returns or raises when the watch ends."""
        root = (self._root + prefix).encode()
        found = await client.get_prefix(root)
        self._works(prefix)
        entries: dict[Key, T] = {}
        for item in found:
            key = _key(root, item.key)
            # What can't be read leaves the entry as it was.
            value = _parse(item.key, item.value, message)
            if value is None:
                value = table.entries.get(key)
            if value is not None:
                entries[key] = value
        # After an outage an empty etcd says nothing yet about who is alive: processes re-register
        # within a keep-alive. What is missing is dropped only if it stays away that long.
        missing = {key: value for key, value in table.entries.items() if key not in entries}
        table.replace({**missing, **entries}, found.header.revision)
        watch = await client.watch_prefix(root, start_revision=found.header.revision + 1)
        with _Doubted(table) as doubted:
            doubted.add(missing)
            async for event in watch:
                self._take(event, _key(root, event.kv.key), message, table, doubted)

    def _take(
        self,
        event: aetcd.rtypes.Event,
        key: Key,
        message: type[T],
        table: Table[T],
        doubted: _Doubted,
    ) -> None:
        """Changes the table as the event says."""
        changed = dict(table.entries)
        if event.kind == aetcd.rtypes.EventKind.DELETE:
            if self._silence.casts_doubt(asyncio.get_running_loop().time()):
                doubted.add([key])
            else:
                changed.pop(key, None)
        elif (value := _parse(event.kv.key, event.kv.value, message)) is not None:
            changed[key] = value
            doubted.discard(key)
        table.replace(changed, event.kv.mod_revision)


class _Doubted:
    """Entries that etcd does not have, and perhaps should: dropped unless they come back within a
    lease."""

    def __init__(self, table: Table[Any]) -> None:
        self._table = table
        self._batches: dict[Key, set[Key]] = {}
        """With which others each was added, those that are still in doubt."""
        self._timers: set[asyncio.TimerHandle] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()

    def add(self, keys: Collection[Key]) -> None:
        loop, batch = asyncio.get_running_loop(), set(keys)
        for key in batch:
            self.discard(key)

        def drop() -> None:
            self._timers.discard(timer)
            self._drop(batch)

        timer = loop.call_later(LEASE_SECONDS, drop)
        self._timers.add(timer)
        self._batches.update(dict.fromkeys(batch, batch))

    def discard(self, key: Key) -> None:
        """It is there."""
        if (batch := self._batches.pop(key, None)) is not None:
            batch.remove(key)

    def _drop(self, gone: Collection[Key]) -> None:
        for key in gone:
            del self._batches[key]
        if gone:
            log.info("entries did not come back", keys=["/".join(key) for key in gone])
            entries = self._table.entries
            self._table.replace({key: entries[key] for key in entries if key not in gone})


def _key(root: bytes, key: bytes) -> Key:
    return tuple(unquote(part) for part in key[len(root) :].decode(errors="replace").split("/"))


def _to_json(message: Message) -> bytes:
    return json_format.MessageToJson(message, indent=None).encode()


def _parse(key: bytes, value: bytes, message: type[T]) -> T | None:
    try:
        return json_format.Parse(value, message(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        log.error("unreadable entry", key=key.decode(errors="replace"), error=str(error))
        return None
