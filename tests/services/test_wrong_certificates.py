"""A peer with another service's certificate is not taken for one that is away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from deploy.local import certificates
from libs.common.channels import Channels
from libs.common.discovery import Table
from libs.common.tasks import background
from services.frontend import router_session
from services.frontend.router_session import RouterSessions
from services.router.degraded import Degraded
from services.router.fleet import Fleet
from services.router.overlap_client import OverlapClient
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2
from tests.fixtures.eventually import until
from tests.fixtures.mutual_tls import server

Instances = Table[discovery_pb2.Instance]


@asynccontextmanager
async def frontend_of(instances: Instances, channels: Channels) -> AsyncIterator[None]:
    async with RouterSessions(8, channels).following(instances):
        yield


@asynccontextmanager
async def fleet_of(instances: Instances, channels: Channels) -> AsyncIterator[None]:
    cards: Table[discovery_pb2.ModelCard] = Table()
    card = discovery_pb2.ModelCard(
        instance_id=1, role=discovery_pb2.ROLE_DECODE_WORKER, kv_block_size_tokens=16
    )
    cards.replace({("m",): card})
    async with AsyncExitStack() as stack:
        fleet = Fleet(instances, cards, 60, channels)
        stack.push_async_callback(fleet.close)
        yield


@asynccontextmanager
async def indexers_of(instances: Instances, channels: Channels) -> AsyncIterator[None]:
    client = OverlapClient(instances, 5, Degraded(), channels)
    async with background(client.run()):
        assert await client.find([kv_indexer_pb2.OverlapQuery()]) == [None]
        yield


Asking = Callable[[Instances, Channels], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize(
    ("asker", "asking", "role", "name"),
    [
        ("frontend", frontend_of, discovery_pb2.ROLE_ROUTER, "router"),
        ("router", fleet_of, discovery_pb2.ROLE_DECODE_WORKER, "worker"),
        ("router", indexers_of, discovery_pb2.ROLE_KV_INDEXER, "kv_indexer"),
    ],
)
async def test_who_shows_anothers_certificate_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asker: str,
    asking: Asking,
    role: discovery_pb2.Role.ValueType,
    name: str,
) -> None:
    monkeypatch.setattr(router_session, "CONNECT_SECONDS", 0.1)
    certificates.make(tmp_path)
    async with server(tmp_path, "client") as running:
        address = f"127.0.0.1:{running.port}"
        instances: Instances = Table()
        instances.replace(
            {("i",): discovery_pb2.Instance(instance_id=1, role=role, name="i", address=address)}
        )
        channels = Channels(certificates.files_of(tmp_path, asker))
        with capture_logs() as logs:
            async with asking(instances, channels):
                await until(lambda: any(log["event"] == "connection not trusted" for log in logs))
    [line] = [log for log in logs if log["event"] == "connection not trusted"]
    assert (line["peer"], line["address"], line["problem"]) == (name, address, "peer_name")
    assert "of client.switchgear, which is not" in line["details"]
