"""`python -m services.frontend keys ...`: makes, lists and removes API keys."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf import json_format

from libs.common.config import ConfigError
from libs.common.discovery import Discovery
from libs.common.errors import SwitchgearError
from services.frontend.config import FrontendSettings
from services.frontend.core.api_keys import (
    SECRET_BYTES,
    api_key_of,
    api_keys_of,
    digest_of,
    new_key,
)
from services.frontend.key_sources import ETCD_PREFIX, read_file
from switchgear.access.v1 import access_pb2

app = typer.Typer(
    name="keys",
    help="API keys, in a file or in etcd. Frontends that run notice changes by themselves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_File = Annotated[
    Path | None, typer.Option("--file", help="A file of keys; else they are in etcd.")
]
_PREFIX = FrontendSettings.model_config["env_prefix"]
_EtcdUrl = Annotated[
    str, typer.Option(help="etcd, as http://host:port.", envvar=f"{_PREFIX}ETCD_URL")
]
_Namespace = Annotated[
    str, typer.Option(help="The deployment's namespace.", envvar=f"{_PREFIX}NAMESPACE")
]
_Limit = Annotated[int, typer.Option(min=0, help="0: no limit.")]
_DEFAULTS = FrontendSettings.model_fields
_ETCD_URL: str = _DEFAULTS["etcd_url"].default
_NAMESPACE: str = _DEFAULTS["namespace"].default


@app.command()
def add(
    key_id: Annotated[str, typer.Argument(help="Names the key in lists and logs.")],
    tenant: Annotated[str, typer.Option(help="Whose it is; by default the key's own name.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use; may be given again. None: all.")
    ] = None,
    concurrent_requests: _Limit = 0,
    requests_per_minute: _Limit = 0,
    tokens_per_minute: _Limit = 0,
    priority: Annotated[
        int, typer.Option(help="The best its requests may have; lower ones are run first.")
    ] = 0,
    steers_routing: Annotated[
        bool, typer.Option("--steers-routing", help="Its requests may name policies and workers.")
    ] = False,
    file: _File = None,
    etcd_url: _EtcdUrl = _ETCD_URL,
    namespace: _Namespace = _NAMESPACE,
) -> None:
    """Makes a key and prints it, once: only its hash is kept."""
    key = new_key(secrets.token_bytes(SECRET_BYTES))
    message = access_pb2.ApiKey(
        key_id=key_id,
        key_sha256=digest_of(key).hex(),
        tenant=tenant or key_id,
        models=model or [],
        concurrent_requests=concurrent_requests,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        priority=priority,
        steers_routing=steers_routing,
    )
    with _problems_told():
        api_key_of(message)
        stored = _read(file, etcd_url, namespace)
        if key_id in stored:
            raise ValueError(f"there is a key {key_id!r} already; remove it first")
        if file is None:
            discovery = _discovery(etcd_url, namespace)
            asyncio.run(discovery.put(ETCD_PREFIX + key_id, message))
        else:
            _write(file, stored | {key_id: message})
    print(key)


@app.command(name="list")
def list_keys(
    file: _File = None, etcd_url: _EtcdUrl = _ETCD_URL, namespace: _Namespace = _NAMESPACE
) -> None:
    """Shows all keys, one JSON object a line, without anything secret."""
    with _problems_told():
        stored = _read(file, etcd_url, namespace)
    for _, message in sorted(stored.items()):
        message.ClearField("key_sha256")
        print(json_format.MessageToJson(message, indent=None, preserving_proto_field_name=True))


@app.command()
def remove(
    key_id: Annotated[str, typer.Argument()],
    file: _File = None,
    etcd_url: _EtcdUrl = _ETCD_URL,
    namespace: _Namespace = _NAMESPACE,
) -> None:
    """Removes a key. Its running requests go on, new ones are refused."""
    with _problems_told():
        stored = _read(file, etcd_url, namespace)
        if stored.pop(key_id, None) is None:
            raise ValueError(f"there is no key {key_id!r}")
        if file is None:
            asyncio.run(_discovery(etcd_url, namespace).delete(ETCD_PREFIX + key_id))
        else:
            _write(file, stored)


@contextmanager
def _problems_told() -> Iterator[None]:
    """Ends the program with the text of what went wrong."""
    try:
        yield
    except (SwitchgearError, ConfigError, ValueError, OSError) as error:
        typer.echo(f"keys: {error}", err=True)
        raise typer.Exit(1) from None


def _discovery(etcd_url: str, namespace: str) -> Discovery:
    """With the certificates and the password that the environment names for the frontend."""
    settings = FrontendSettings()
    settings.check_files()
    return Discovery(etcd_url, namespace, settings.etcd_access)


def _read(file: Path | None, etcd_url: str, namespace: str) -> dict[str, access_pb2.ApiKey]:
    """All keys by id. A file that is not there yet has none."""
    if file is None:
        discovery = _discovery(etcd_url, namespace)
        entries = asyncio.run(discovery.read(ETCD_PREFIX, access_pb2.ApiKey))
        return {message.key_id: message for message in entries.values()}
    if not file.exists():
        return {}
    _, messages = read_file(file)
    api_keys_of(messages)
    return {message.key_id: message for message in messages}


def _write(file: Path, keys: dict[str, access_pb2.ApiKey]) -> None:
    """Replaces the file at once, so that no reader sees half of it. Its owner alone may read it."""
    content = json_format.MessageToJson(
        access_pb2.ApiKeys(keys=keys.values()), indent=2, preserving_proto_field_name=True
    )
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(content + "\n")
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
