"""Starts the router."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf import struct_pb2

from libs.common.channels import Channels
from libs.common.discovery import Discovery
from libs.common.service import offering, until_idle
from services.router.config import RouterSettings
from services.router.degraded import Degraded
from services.router.fleet import watching_workers
from services.router.live_settings import LiveSettings
from services.router.overlap_client import asking_indexers
from services.router.servicer import RouterServicer
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2, router_pb2_grpc

SETTLE_SECONDS = 3.0
"""How long workers may take to answer before the router takes requests without them."""

SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Routes until told to stop, then lets running requests finish."""
    discovery = Discovery(settings.etcd_url, settings.namespace, settings.etcd_access)
    await discovery.check_access()
    channels = Channels(settings.certificates)
    degraded = Degraded()
    async with (
        watching_workers(discovery, settings.estimate_ttl_seconds, channels) as fleet,
        asking_indexers(
            discovery, settings.overlap_timeout_seconds, degraded, channels, fleet.name_of
        ) as overlaps,
        discovery.watching("config/router/", struct_pb2.Value) as live,
    ):
        await fleet.settled(SETTLE_SECONDS)
        servicer = RouterServicer(fleet, overlaps, LiveSettings(settings, live), degraded)

        def add_services(server: grpc.aio.Server) -> None:
            router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)

        async def drain() -> None:
            await until_idle(lambda: servicer.is_idle, settings.drain_seconds)
            servicer.closing.set()

        async with offering(
            settings,
            discovery,
            discovery_pb2.ROLE_ROUTER,
            add_services,
            [SERVICE_NAME],
            drain=drain,
        ):
            await stop.wait()
