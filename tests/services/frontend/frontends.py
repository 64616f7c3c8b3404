"""A frontend in this process, between real sockets: HTTP in front, fake routers behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from prometheus_client import CollectorRegistry

from libs.common.discovery import Discovery, Table
from libs.common.grpc_server import serving
from services.frontend.config import FrontendSettings
from services.frontend.http_server import HttpServer, serving_http
from services.frontend.key_sources import controlled_access
from services.frontend.metrics import FrontendMetrics
from services.frontend.model_files import ModelFileStore
from services.frontend.models import Models
from services.frontend.openai.app import create_app
from services.frontend.pipeline import Pipeline
from services.frontend.response_store import response_store
from services.frontend.router_session import RouterSessions
from switchgear.discovery.v1 import discovery_pb2
from switchgear.worker.v1 import worker_pb2
from switchgear.worker.v1.worker_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from tests.fixtures.eventually import until
from tests.services.frontend import byte_model
from tests.services.frontend.fake_router import FakeRouter

WORKER_ID = 77


class FileServer(WorkerServiceServicer):
    """The part of a worker that frontends talk to."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.calls = 0

    async def GetModelFiles(
        self,
        request: worker_pb2.GetModelFilesRequest,
        context: grpc.aio.ServicerContext[
            worker_pb2.GetModelFilesRequest, worker_pb2.GetModelFilesResponse
        ],
    ) -> AsyncIterator[worker_pb2.GetModelFilesResponse]:
        self.calls += 1
        for name, data in self.files.items():
            for begin in range(0, len(data), 1000):
                piece = data[begin : begin + 1000]
                yield worker_pb2.GetModelFilesResponse(name=name, data=piece)


@asynccontextmanager
async def file_server(
    files: Mapping[str, bytes] = byte_model.FILES, instance_id: int = WORKER_ID
) -> AsyncIterator[tuple[FileServer, discovery_pb2.Instance]]:
    """A worker that gives its model's files while the body runs."""
    servicer = FileServer(files)  # type: ignore[abstract]

    def add(server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(servicer, server)

    async with serving("127.0.0.1", 0, add, [], grace_seconds=0) as server:
        yield (
            servicer,
            discovery_pb2.Instance(
                instance_id=instance_id,
                role=discovery_pb2.ROLE_DECODE_WORKER,
                name="decode-0",
                address=f"127.0.0.1:{server.port}",
            ),
        )


@dataclass
class Frontend:
    """A frontend that runs, and what it believes about the world."""

    pipeline: Pipeline
    models: Models
    sessions: RouterSessions
    instances: Table[discovery_pb2.Instance]
    cards: Table[discovery_pb2.ModelCard]
    http: HttpServer
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    def list_instances(self, *instances: discovery_pb2.Instance) -> None:
        """These instances are alive, and no others."""
        self.instances.replace({(i.name, f"{i.instance_id:x}"): i for i in instances})

    def list_cards(self, *cards: discovery_pb2.ModelCard) -> None:
        """These model cards are registered, and no others."""
        self.cards.replace({(c.model, f"{c.instance_id:x}"): c for c in cards})

    async def until_ready(self) -> None:
        await until(lambda: not self.pipeline.problem())

    async def chat(self, **fields: Any) -> httpx.Response:
        """Asks for a chat completion, with whatever fields."""
        body = {"model": byte_model.NAME, "messages": [{"role": "user", "content": "Hi"}]}
        return await self.client.post("/v1/chat/completions", json=body | fields)

    async def complete(self, **fields: Any) -> httpx.Response:
        """Asks for a completion, with whatever fields."""
        return await self.client.post(
            "/v1/completions", json={"model": byte_model.NAME, "prompt": "Hi"} | fields
        )

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 when there is none."""
        registry = self.pipeline.metrics.registry
        return registry.get_sample_value(f"switchgear_frontend_{name}", labels) or 0.0


@asynccontextmanager
async def frontend(
    folder: Path,
    routers: Sequence[FakeRouter] = (),
    cards: Sequence[discovery_pb2.ModelCard] | None = None,
    workers: Sequence[discovery_pb2.Instance] | None = None,
    **settings: Any,
) -> AsyncIterator[Frontend]:
    """A frontend with these routers; by default with one decode worker of the byte model."""
    async with AsyncExitStack() as stack:
        if workers is None:
            _, worker = await stack.enter_async_context(file_server())
            workers = [worker]
        options = {"http_port": 0, "cache_folder": folder, "patience_seconds": 2.0} | settings
        parsed = FrontendSettings.model_validate(options)
        instances: Table[discovery_pb2.Instance] = Table()
        known_cards: Table[discovery_pb2.ModelCard] = Table()
        # Not asked before it is there: nothing in here needs etcd, unless keys are to be in it.
        discovery = Discovery(parsed.etcd_url, parsed.namespace)
        access = await stack.enter_async_context(controlled_access(parsed, discovery))
        store = await stack.enter_async_context(response_store(parsed))
        sessions = RouterSessions(parsed.session_window_responses)
        models = Models(
            known_cards,
            instances,
            ModelFileStore(folder / "tokenizers"),
            token_cache_bytes=parsed.token_cache_bytes,
        )
        metrics = FrontendMetrics(CollectorRegistry())
        pipeline = Pipeline(parsed, models, sessions, metrics, access)
        await stack.enter_async_context(sessions.following(instances))
        await stack.enter_async_context(models.following())
        http = await stack.enter_async_context(serving_http(create_app(pipeline, store), parsed))
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=30)
        )
        running = Frontend(pipeline, models, sessions, instances, known_cards, http, client)
        running.list_instances(*workers, *(router.instance for router in routers))
        running.list_cards(*([byte_model.card(WORKER_ID)] if cards is None else cards))
        if routers and cards is None:
            await running.until_ready()
        yield running
