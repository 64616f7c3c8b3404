"""Live settings: written to etcd, and what the running processes made of them."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from typing import Literal
from urllib.parse import quote, unquote

from google.protobuf import json_format, struct_pb2
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.local import topology
from deploy.local.ask_router import CALL_SECONDS, RouterAt, asking
from deploy.local.cluster import ClusterError
from libs.common.credentials import ServerAccess
from libs.common.discovery import Discovery
from libs.common.errors import CredentialsRefused, NoLiveInstance
from switchgear.router.v1 import router_pb2

Component = Literal["router"]
"""Those that have live settings."""

_FOLLOW_SECONDS = 10.0
_POLL_SECONDS = 0.05


def full_key(component: Component, key: str, model: str) -> str:
    """Where a setting is in etcd, after the namespace."""
    path = f"config/{component}/{quote(key, safe='')}"
    return f"{path}/{quote(model, safe='')}" if model else path


def parsed(value: str) -> struct_pb2.Value:
    """A value as typed: JSON, or a text."""
    try:
        return json_format.Parse(value, struct_pb2.Value())
    except json_format.ParseError:
        return struct_pb2.Value(string_value=value)


def write(
    etcd_url: str, key: str, value: struct_pb2.Value | None, access: ServerAccess | None = None
) -> int:
    """Writes or removes (None) an entry; its revision. Raises ClusterError."""
    discovery = Discovery(etcd_url, topology.NAMESPACE, access)
    change = discovery.delete(key) if value is None else discovery.put(key, value)
    try:
        return asyncio.run(change)
    except (NoLiveInstance, CredentialsRefused) as error:
        raise ClusterError(error.message) from error


def settings_of(
    routers: Mapping[str, RouterAt],
) -> Iterator[tuple[str, router_pb2.GetSettingsResponse]]:
    """What each router goes by now. Raises ClusterError when one does not answer."""
    for name, at in routers.items():
        with asking(name, at) as router:
            settings = router.GetSettings(router_pb2.GetSettingsRequest(), timeout=CALL_SECONDS)
        yield name, settings


def wait_followed(routers: Mapping[str, RouterAt], key: str, revision: int) -> list[str]:
    """Returns once every router goes by etcd as of the revision; what went wrong, in words."""
    rejected_key = unquote(key.split("/", 2)[2])
    deadline = time.monotonic() + _FOLLOW_SECONDS
    while True:
        behind: list[str] = []
        problems: list[str] = []
        for name, settings in settings_of(routers):
            if settings.revision < revision:
                behind.append(name)
            problems += (
                f"{name} rejects {rejected.value}: {rejected.problem}"
                for rejected in settings.rejected
                if rejected.key == rejected_key
            )
        if not behind:
            return problems
        if time.monotonic() > deadline:
            return [*problems, f"not followed yet by {', '.join(behind)}"]
        time.sleep(_POLL_SECONDS)


def shown(router: str, settings: router_pb2.GetSettingsResponse) -> RenderableType:
    """One router's settings."""
    table = Table("setting", "value", "for", "from", box=None, header_style="dim", padding=(0, 1))
    for setting in settings.settings:
        table.add_row(
            setting.key,
            str(json.loads(setting.value)),
            setting.model or "all models",
            "etcd" if setting.is_live else "its start",
        )
    rejected = [
        Text(f" rejected: {it.key} = {it.value}: {it.problem}", style="red")
        for it in settings.rejected
    ]
    title = Text.assemble((router, "bold"), f"  as of revision {settings.revision} of etcd")
    return Group(title, table, *rejected, Text())
