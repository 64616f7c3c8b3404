"""Where API keys come from, a file or etcd, and how changes arrive."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from google.protobuf import json_format

from libs.common import logs
from libs.common.config import ConfigError
from libs.common.discovery import Discovery, Table
from libs.common.tasks import background
from services.frontend.access import Access
from services.frontend.config import FrontendSettings
from services.frontend.core.api_keys import ApiKey, BadApiKey, api_key_of, api_keys_of
from switchgear.access.v1 import access_pb2

log = logs.get(__name__)

NONE, ETCD = "none", "etcd"
ETCD_PREFIX = "config/frontend/keys/"
FILE_POLL_SECONDS = 1.0

_Stamp = tuple[int, int, int]


@asynccontextmanager
async def controlled_access(
    settings: FrontendSettings, discovery: Discovery
) -> AsyncIterator[Access]:
    """The access that the settings ask for, kept up to date while the body runs.

    Raises ConfigError when it would be open to others unasked, or when the file can't be used.
    """
    access = Access(is_open=settings.api_keys == NONE)
    if access.is_open:
        if not _is_loopback(settings.host) and not settings.allow_open_access:
            raise ConfigError(
                f"host is {settings.host}, which others can reach, and api_keys is none: name API "
                "keys with --api-keys, or say --allow-open-access"
            )
        yield access
    elif settings.api_keys == ETCD:
        async with (
            discovery.watching(ETCD_PREFIX, access_pb2.ApiKey) as table,
            background(_follow_table(access, table)),
        ):
            yield access
    else:
        path = Path(settings.api_keys)
        try:
            stamp, messages = read_file(path)
            access.set_keys(api_keys_of(messages))
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_keys: {error}") from error
        async with background(_follow_file(access, path, stamp)):
            yield access


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_file(path: Path) -> tuple[_Stamp, list[access_pb2.ApiKey]]:
    """The keys in a file, and what changes with the file. Raises OSError and ValueError."""
    with path.open("rb") as file:
        stamp = _stamp_of(os.fstat(file.fileno()))
        content = file.read()
    try:
        # json_format takes an empty list for an empty message.
        parsed = json_format.ParseDict({**orjson.loads(content)}, access_pb2.ApiKeys())
    except (json_format.ParseError, orjson.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a file of API keys: {error}") from error
    return stamp, list(parsed.keys)


def _stamp_of(stat: os.stat_result) -> _Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


async def _follow_file(access: Access, path: Path, stamp: _Stamp) -> None:
    while True:
        await asyncio.sleep(FILE_POLL_SECONDS)
        try:
            if await asyncio.to_thread(lambda: _stamp_of(path.stat())) == stamp:
                continue
            stamp, messages = await asyncio.to_thread(read_file, path)
            access.set_keys(api_keys_of(messages))
            log.info("API keys changed", path=str(path), keys=len(messages))
        except (OSError, ValueError) as error:
            # A file that is just being replaced, or has a mistake: who had access keeps it.
            log.error("API keys not read", path=str(path), error=str(error))


async def _follow_table(access: Access, table: Table[access_pb2.ApiKey]) -> None:
    def refresh() -> None:
        keys = list(_usable(table.entries.items()))
        access.set_keys(keys)
        log.info("API keys changed", keys=len(keys))

    await table.was_read.wait()
    refresh()
    table.on_change(refresh)


def _usable(entries: Iterable[tuple[tuple[str, ...], access_pb2.ApiKey]]) -> Iterable[ApiKey]:
    """One entry that can't be used must not lock out the holders of the others."""
    for name, message in entries:
        try:
            if name != (message.key_id,):
                raise BadApiKey(f"API key {message.key_id!r} is stored as {'/'.join(name)!r}")
            yield api_key_of(message)
        except BadApiKey as error:
            log.error("API key not used", error=str(error))
