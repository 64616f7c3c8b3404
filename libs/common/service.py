"""What every service does around its own work: metrics, gRPC, registration, draining."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import grpc

from libs.common import logs
from libs.common.config import ServiceSettings
from libs.common.discovery import Discovery, component, new_instance_id
from libs.common.grpc_server import GrpcServer, ServerTls, serving
from libs.common.metrics import serving_metrics
from switchgear.discovery.v1 import discovery_pb2

log = logs.get(__name__)

IDLE_POLL_SECONDS = 0.05
GARBAGE_THRESHOLD_OBJECTS = 20_000


@asynccontextmanager
async def offering(
    settings: ServiceSettings,
    discovery: Discovery,
    role: discovery_pb2.Role.ValueType,
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    drain: Callable[[], Awaitable[None]],
    instance_id: int | None = None,
    cards: Iterable[discovery_pb2.ModelCard] = (),
) -> AsyncIterator[GrpcServer]:
    """Serves gRPC and metrics and is registered while the body runs.

    At the end, in this order: out of discovery and NOT_SERVING, `drain`, server stopped. Raises
    CannotListen.
    """
    host, certificates = settings.reachable_host, settings.certificates
    with serving_metrics(settings.host, settings.metrics_port) as metrics_port:
        async with serving(
            settings.host,
            settings.grpc_port,
            add_services,
            service_names,
            tls=ServerTls(certificates, component(role)) if certificates else None,
        ) as server:
            instance = discovery_pb2.Instance(
                instance_id=instance_id or new_instance_id(),
                role=role,
                name=settings.name or f"{component(role)}-{server.port}",
                address=f"{host}:{server.port}",
                metrics_address=f"{host}:{metrics_port}",
            )
            async with discovery.registered(instance, cards):
                await server.set_serving(True)
                spare_the_garbage_collector()
                log.info(
                    "serving",
                    address=instance.address,
                    metrics_address=instance.metrics_address,
                    instance_id=f"{instance.instance_id:016x}",
                )
                yield server
            await server.set_serving(False)
            await drain()


def spare_the_garbage_collector() -> None:
    """What start-up has made stays. Looking through it again and again would stop all streams of
    the process for tens of milliseconds each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD_OBJECTS, 10, 10)


async def until_idle(is_idle: Callable[[], bool], limit_seconds: float) -> None:
    """Waits until nothing is on its way, or the limit is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_seconds
    while not is_idle():
        if loop.time() >= deadline:
            log.warning("drain limit reached with requests on their way", seconds=limit_seconds)
            return
        await asyncio.sleep(IDLE_POLL_SECONDS)
