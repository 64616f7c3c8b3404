"""Puts the KV indexer together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
from nats.aio.client import Client

from libs.common import logs
from libs.common.channels import Channels
from libs.common.discovery import Discovery, Table, component, new_instance_id
from libs.common.grpc_server import GrpcServer, ServerTls, serving
from libs.common.kv_events import InstanceId
from libs.common.metrics import serving_metrics
from libs.common.nats_client import connecting, connection_number
from libs.common.service import spare_the_garbage_collector
from libs.common.tasks import background
from services.kv_indexer import metrics
from services.kv_indexer.batches import fetch_batches
from services.kv_indexer.config import KvIndexerSettings
from services.kv_indexer.core.index import BlockIndex, CompiledIndex, FastestIndex
from services.kv_indexer.events import receiving
from services.kv_indexer.indexer import Indexer
from services.kv_indexer.servicer import SERVICE_NAME, KvIndexerServicer
from services.kv_indexer.snapshots import Worker, fetch_snapshot
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2_grpc

log = logs.get(__name__)

COMPONENT = component(discovery_pb2.ROLE_KV_INDEXER)


async def serve(settings: KvIndexerSettings, stop: asyncio.Event) -> None:
    """Runs the service until `stop` is set. Serves once it knows who is alive; the index fills
    itself from then on."""
    discovery = Discovery(settings.etcd_url, settings.namespace, settings.etcd_access)
    await discovery.check_access()
    certificates = settings.certificates
    name = settings.name or "kv_indexer"
    index = FastestIndex(settings.max_index_bytes)
    metrics.is_compiled.set(CompiledIndex is not None)
    log.info("made the index", is_compiled=CompiledIndex is not None, block_bytes=index.block_bytes)
    with serving_metrics(settings.host, settings.metrics_port) as metrics_port:
        async with (
            discovery.watching("instances/", discovery_pb2.Instance) as instances,
            discovery.watching("models/", discovery_pb2.ModelCard) as cards,
            connecting(settings.nats_url, name, settings.nats_access) as nats,
        ):
            indexer = _indexer(settings, index, nats)
            follow_discovery(indexer, instances, cards)
            servicer = KvIndexerServicer(indexer)

            def add_services(server: grpc.aio.Server) -> None:
                kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server(servicer, server)

            async with (
                # If a snapshot overtakes the subscription, heartbeats show what fell in between.
                receiving(nats, settings.namespace, indexer.take),
                background(indexer.run()) as following,
                serving(
                    settings.host,
                    settings.grpc_port,
                    add_services,
                    [SERVICE_NAME],
                    tls=ServerTls(certificates, COMPONENT) if certificates else None,
                ) as server,
                _ending(servicer),
                background(
                    _offer(settings, discovery, server, metrics_port, [instances, cards])
                ) as offering,
                background(_until(stop)) as stopping,
            ):
                # The first two end only by failing, which their contexts raise.
                await asyncio.wait(
                    {following, offering, stopping}, return_when=asyncio.FIRST_COMPLETED
                )


def _indexer(settings: KvIndexerSettings, index: BlockIndex, nats: Client) -> Indexer:
    channels, seconds = Channels(settings.certificates), settings.recovery_timeout_seconds
    return Indexer(
        index=index,
        fetch_snapshot=partial(fetch_snapshot, timeout_seconds=seconds, channels=channels),
        fetch_batches=partial(fetch_batches, timeout_seconds=seconds, channels=channels),
        events_connection=lambda: connection_number(nats),
        silent_after_seconds=settings.silent_after_seconds,
        recoveries_at_once=settings.recoveries_at_once,
    )


def follow_discovery(
    indexer: Indexer,
    instances: Table[discovery_pb2.Instance],
    cards: Table[discovery_pb2.ModelCard],
) -> None:
    """Makes the indexer follow whoever is alive and publishes KV events, now and from now on."""

    def update() -> None:
        indexer.set_workers(live_workers(instances.values(), cards.values()))

    instances.on_change(update)
    cards.on_change(update)
    update()


def live_workers(
    instances: Iterable[discovery_pb2.Instance], cards: Iterable[discovery_pb2.ModelCard]
) -> dict[InstanceId, Worker]:
    """Those that have both an address and a model whose KV events they publish.

    Of several at one address only the youngest: a worker that was killed and started again is
    there before the lease of the one it replaces ends.
    """
    registered = {instance.instance_id: instance for instance in instances}
    publishing = [
        card for card in cards if card.publishes_kv_events and card.instance_id in registered
    ]
    youngest: dict[str, int] = {}
    for card in publishing:
        address = registered[card.instance_id].address
        youngest[address] = max(youngest.get(address, 0), card.created_unix_seconds)
    return {
        card.instance_id: Worker(
            card.instance_id,
            registered[card.instance_id].address,
            card.model,
            card.kv_block_size_tokens,
            registered[card.instance_id].name,
        )
        for card in publishing
        if card.created_unix_seconds == youngest[registered[card.instance_id].address]
    }


async def _offer(
    settings: KvIndexerSettings,
    discovery: Discovery,
    server: GrpcServer,
    metrics_port: int,
    tables: Sequence[Table[Any]],
) -> None:
    """Once discovery has been read, says that we serve, and stays registered until cancelled."""
    for table in tables:
        await table.was_read.wait()
    await server.set_serving(True)
    instance = discovery_pb2.Instance(
        instance_id=new_instance_id(),
        role=discovery_pb2.ROLE_KV_INDEXER,
        name=settings.name or f"kv_indexer-{server.port}",
        address=f"{settings.reachable_host}:{server.port}",
        metrics_address=f"{settings.reachable_host}:{metrics_port}",
    )
    spare_the_garbage_collector()
    log.info("serving", address=instance.address, metrics_address=instance.metrics_address)
    async with discovery.registered(instance):
        await asyncio.Event().wait()


@asynccontextmanager
async def _ending(servicer: KvIndexerServicer) -> AsyncIterator[None]:
    """Ends routers' sessions when the body is left."""
    try:
        yield
    finally:
        servicer.closing.set()


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()
