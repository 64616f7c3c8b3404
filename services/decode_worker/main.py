"""Starts the decode worker."""

from __future__ import annotations

import asyncio

import grpc

from libs.engine.interface import Leg
from libs.worker.host import EngineHost
from libs.worker.serve import WorkerKind, serve_worker
from services.decode_worker.config import DecodeWorkerSettings
from services.decode_worker.servicer import DecodeWorkerServicer
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.discovery.v1 import discovery_pb2

SERVICE_NAME = decode_worker_pb2.DESCRIPTOR.services_by_name["DecodeWorkerService"].full_name


def _add_plain_service(host: EngineHost, server: grpc.aio.Server) -> None:
    decode_worker_pb2_grpc.add_DecodeWorkerServiceServicer_to_server(
        DecodeWorkerServicer(host), server
    )


KIND = WorkerKind(
    role=discovery_pb2.ROLE_DECODE_WORKER,
    legs=frozenset({Leg.DECODE, Leg.WHOLE}),
    plain_service_name=SERVICE_NAME,
    add_plain_service=_add_plain_service,
)


async def serve(settings: DecodeWorkerSettings, stop: asyncio.Event) -> None:
    """Serves until told to stop, then lets running requests finish."""
    await serve_worker(KIND, settings, stop)
