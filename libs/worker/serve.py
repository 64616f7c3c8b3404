"""Starts a worker: model files, engine, KV events, gRPC, registration; and stops it in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import REGISTRY

from libs.common import logs, model_files, nats_client
from libs.common.config import ConfigError
from libs.common.discovery import Discovery, new_instance_id
from libs.common.errors import EngineDied
from libs.common.grpc_server import GrpcServer
from libs.common.service import offering, until_idle
from libs.common.tasks import background
from libs.engine.interface import Engine, EngineInfo, Leg
from libs.worker.config import WorkerSettings
from libs.worker.core import wire
from libs.worker.core.wire import Limits
from libs.worker.engines import make_engine
from libs.worker.host import EngineHost
from libs.worker.kv_publisher import KvPublisher
from libs.worker.metrics import WorkerCollector
from libs.worker.servicer import WorkerServicer
from switchgear.discovery.v1 import discovery_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

log = logs.get(__name__)

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name

MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What frontends may need. Absent ones are left out; tokenizer.json must be there."""

_MAIN_LEGS = (Leg.PREFILL, Leg.DECODE, Leg.WHOLE)
"""The first of these that a worker runs is what its engine is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerKind:
    """What a prefill worker and a decode worker differ in."""

    role: discovery_pb2.Role.ValueType
    legs: frozenset[Leg]
    """What its engine is given to run."""
    plain_service_name: str
    """Of the gRPC service that it offers to people and scripts, beside the workers' own."""
    add_plain_service: Callable[[EngineHost, grpc.aio.Server], None]


async def serve_worker(kind: WorkerKind, settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serves until told to stop, then lets running requests finish.

    Raises ConfigError for a model folder that can't be served, or a task that is not for this
    worker, CredentialsRefused, and EngineDied.
    """
    legs = _legs(kind, settings)
    discovery = Discovery(settings.etcd_url, settings.namespace, settings.etcd_access)
    await discovery.check_access()
    files = await asyncio.to_thread(read_model_files, settings.model)
    engine = make_engine(settings, next(leg for leg in _MAIN_LEGS if leg in legs))
    instance_id = new_instance_id()
    host = EngineHost(engine, max_waiting_requests=settings.max_waiting_requests)
    try:
        info = await _unless(stop, _started(engine, host, settings))
        if info is None:
            return
        host.limits = Limits(settings.model_name, info, legs)
        card = _card(settings, info, kind.role, instance_id, files)
        async with _publishing(settings, host, info, instance_id) as publisher:
            WorkerCollector(engine, publisher.cached_blocks, publisher.evicted_blocks).register(
                REGISTRY
            )
            servicer = WorkerServicer(
                host, files, publisher.snapshot, publisher.batches, publisher.cached_blocks
            )
            async with _offering(kind, settings, discovery, host, servicer, card):
                await _until(stop, host.failure)
    finally:
        await engine.close()


def _legs(kind: WorkerKind, settings: WorkerSettings) -> frozenset[Leg]:
    if settings.task == "generate":
        return kind.legs
    if Leg.WHOLE not in kind.legs:
        raise ConfigError(f"--task {settings.task} is for decode workers")
    return frozenset({Leg.WHOLE})


async def _started(engine: Engine, host: EngineHost, settings: WorkerSettings) -> EngineInfo:
    began = time.monotonic()
    log.info("engine starting", engine=settings.engine, model=str(settings.model))
    info = await engine.start(host)
    log.info("engine started", seconds=round(time.monotonic() - began, 1), info=repr(info))
    return info


@asynccontextmanager
async def _publishing(
    settings: WorkerSettings, host: EngineHost, info: EngineInfo, instance_id: int
) -> AsyncIterator[KvPublisher]:
    """Tells the engine's KV events over NATS while the body runs; with `kv_events` off, no more
    than that the worker lives."""
    async with nats_client.connecting(
        settings.nats_url, settings.name, settings.nats_access
    ) as nats:
        publisher = KvPublisher(
            nats,
            namespace=settings.namespace,
            instance_id=instance_id,
            model=settings.model_name,
            block_size_tokens=info.block_size_tokens,
            has_host_tier=info.has_host_tier,
        )
        host.publish_to(publisher.take if settings.kv_events else lambda events: None)
        async with background(publisher.run()):
            yield publisher


def _offering(
    kind: WorkerKind,
    settings: WorkerSettings,
    discovery: Discovery,
    host: EngineHost,
    servicer: WorkerServicer,
    card: discovery_pb2.ModelCard,
) -> AbstractAsyncContextManager[GrpcServer]:
    def add_services(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        kind.add_plain_service(host, server)

    async def drain() -> None:
        host.is_draining = True
        await until_idle(host.idle.is_set, settings.drain_seconds)
        servicer.closing.set()

    return offering(
        settings,
        discovery,
        kind.role,
        add_services,
        [SERVICE_NAME, kind.plain_service_name],
        drain=drain,
        instance_id=card.instance_id,
        cards=[card],
    )


async def _unless(
    stop: asyncio.Event, starting: Coroutine[Any, Any, EngineInfo]
) -> EngineInfo | None:
    """What the start gives, or None when the process is told to stop first: loading a model takes
    minutes, and nobody waits that long for a process that has nothing to finish."""
    started, stopped = asyncio.create_task(starting), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return started.result() if started.done() else None
    finally:
        for task in (started, stopped):
            task.cancel()
        await asyncio.wait({started, stopped})


async def _until(stop: asyncio.Event, failure: asyncio.Future[BaseException]) -> None:
    stopped = asyncio.create_task(stop.wait())
    waited: set[asyncio.Future[Any]] = {stopped, failure}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    if failure.done():
        raise EngineDied(
            "the engine died: requests move to other workers, and this process ends, for whoever"
            " watches over it to start it again"
        ) from failure.result()


def read_model_files(model: Path) -> dict[str, bytes]:
    """The model's tokenizer, template and configuration. Raises ConfigError without a tokenizer."""
    files = {name: (model / name).read_bytes() for name in MODEL_FILES if (model / name).is_file()}
    if "tokenizer.json" not in files:
        raise ConfigError(f"--model is {str(model)!r}, where there is no tokenizer.json")
    return files


def _card(
    settings: WorkerSettings,
    info: EngineInfo,
    role: discovery_pb2.Role.ValueType,
    instance_id: int,
    files: dict[str, bytes],
) -> discovery_pb2.ModelCard:
    # A prefill worker alone can't answer anybody; a decode worker can.
    needs = [discovery_pb2.ROLE_DECODE_WORKER] if role == discovery_pb2.ROLE_PREFILL_WORKER else []
    return discovery_pb2.ModelCard(
        instance_id=instance_id,
        role=role,
        model=settings.model_name,
        aliases=settings.model_aliases,
        context_length_tokens=info.context_length_tokens,
        kv_block_size_tokens=info.block_size_tokens,
        total_kv_blocks=info.total_kv_blocks,
        max_running_requests=info.max_running_requests,
        needs=needs,
        transfer_backend=info.transfer_backend,
        files_checksum=model_files.checksum(files),
        publishes_kv_events=settings.kv_events and info.publishes_kv_events,
        created_unix_seconds=int(time.time()),
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser,
        pooling_tasks=map(wire.pooling_task, info.pooling_tasks),
    )
