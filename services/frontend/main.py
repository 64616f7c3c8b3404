"""Starts the frontend."""

from __future__ import annotations

import asyncio

import grpc

from libs.common import logs
from libs.common.channels import Channels
from libs.common.discovery import Discovery
from libs.common.grpc_server import GrpcServer
from libs.common.service import offering
from libs.common.tasks import background
from services.frontend.config import FrontendSettings
from services.frontend.http_server import serving_http
from services.frontend.key_sources import controlled_access
from services.frontend.metrics import FrontendMetrics
from services.frontend.model_files import ModelFileStore
from services.frontend.models import Models
from services.frontend.openai.app import create_app
from services.frontend.pipeline import Pipeline
from services.frontend.response_store import response_store
from services.frontend.router_session import RouterSessions
from services.frontend.servicer import InferenceServicer
from switchgear.discovery.v1 import discovery_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server

log = logs.get(__name__)

HEALTH_SECONDS = 0.2
"""How soon gRPC health shows what /health says."""

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


async def serve(settings: FrontendSettings, stop: asyncio.Event) -> None:
    """Serves until told to stop, then lets running requests finish."""
    discovery = Discovery(settings.etcd_url, settings.namespace, settings.etcd_access)
    await discovery.check_access()
    channels = Channels(settings.certificates)
    sessions = RouterSessions(settings.session_window_responses, channels)
    async with (
        discovery.watching("instances/", discovery_pb2.Instance) as instances,
        discovery.watching("models/", discovery_pb2.ModelCard) as cards,
        sessions.following(instances),
        controlled_access(settings, discovery) as access,
        response_store(settings) as store,
    ):
        models = Models(
            cards,
            instances,
            ModelFileStore(settings.cache_folder / "tokenizers", channels),
            token_cache_bytes=settings.token_cache_bytes,
        )
        pipeline = Pipeline(settings, models, sessions, FrontendMetrics(), access)

        def add_services(server: grpc.aio.Server) -> None:
            add_InferenceServiceServicer_to_server(InferenceServicer(pipeline), server)

        async with (
            models.following(),
            serving_http(create_app(pipeline, store), settings) as http,
        ):

            async def drain() -> None:
                http.stop_listening()
                await pipeline.wait_idle(settings.drain_seconds)

            async with (
                offering(
                    settings,
                    discovery,
                    discovery_pb2.ROLE_FRONTEND,
                    add_services,
                    [SERVICE_NAME],
                    drain=drain,
                ) as server,
                background(report_health(pipeline, server)),
            ):
                log.info("serving http", port=http.port)
                await stop.wait()
                pipeline.is_draining = True


async def report_health(pipeline: Pipeline, server: GrpcServer) -> None:
    """Keeps gRPC health as /health is."""
    was_serving: bool | None = None
    while True:
        problem = pipeline.problem()
        if (is_serving := not problem) != was_serving:
            log.info("health changed", is_serving=is_serving, problem=problem)
            await server.set_serving(is_serving)
            was_serving = is_serving
        await asyncio.sleep(HEALTH_SECONDS)
