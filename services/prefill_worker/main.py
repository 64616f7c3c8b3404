"""Starts the prefill worker."""

from __future__ import annotations

import asyncio

import grpc

from libs.engine.interface import Leg
from libs.worker.host import EngineHost
from libs.worker.serve import WorkerKind, serve_worker
from services.prefill_worker.config import PrefillWorkerSettings
from services.prefill_worker.servicer import PrefillWorkerServicer
from switchgear.discovery.v1 import discovery_pb2
from switchgear.prefill_worker.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc

SERVICE_NAME = prefill_worker_pb2.DESCRIPTOR.services_by_name["PrefillWorkerService"].full_name


def _add_plain_service(host: EngineHost, server: grpc.aio.Server) -> None:
    prefill_worker_pb2_grpc.add_PrefillWorkerServiceServicer_to_server(
        PrefillWorkerServicer(host), server
    )


KIND = WorkerKind(
    role=discovery_pb2.ROLE_PREFILL_WORKER,
    legs=frozenset({Leg.PREFILL}),
    plain_service_name=SERVICE_NAME,
    add_plain_service=_add_plain_service,
)


async def serve(settings: PrefillWorkerSettings, stop: asyncio.Event) -> None:
    """Serves until told to stop, then lets running requests finish."""
    await serve_worker(KIND, settings, stop)
