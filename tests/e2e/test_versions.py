"""Services of this version and of the previous one serve together, as they do during an update.

Every answer in here is checked token by token (right_answers.py).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from benchmarks.kv_recovery.deployment import IndexDeployment
from deploy.local.ports import FreePorts
from deploy.local.topology import Component, Deployment
from switchgear.common.v1 import generation_pb2
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.right_answers import LONG_TOKENS, Client, Served, new_prompt, under_load
from tests.e2e.versions import SERVICES, MixedDeployment, Version, mixed
from tests.fixtures.eventually import eventually

LONG_ANSWER_TOKENS = 400
"""At least four seconds: a worker that is told to stop meanwhile does not finish it."""
RIGHT_SECONDS = 20.0

# Processes are started four or more times in each, on machines of any speed.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[MixedDeployment]:
    ports = FreePorts()
    asked = Deployment(
        engine="sim",
        model=tokenizer_folder,
        model_name="test-model",
        prefill=2,
        decode=2,
        frontends=2,
        routers=2,
        indexers=2,
        http_port=ports.take(),
        sim_step_ms=10,
        flags={
            # Less than an answer takes: those that run when it stops move to another one.
            "decode_worker": ("--drain-seconds", "0.2"),
            # How slow the machine may be is not what is tried here.
            "router": ("--drain-seconds", "8", "--overlap-timeout-seconds", "5"),
            "frontend": ("--drain-seconds", "8"),
        },
    )
    with mixed(tmp_path_factory.mktemp("run"), asked, ports) as it:
        yield it


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture
async def client(deployment: MixedDeployment, tokenizer: Tokenizer) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(timeout=30) as http:
        yield Client(http, deployment.frontends, deployment.model, tokenizer)


class Index(IndexDeployment):
    """The KV indexers of a deployment, beside all of its workers."""

    def __init__(self, deployment: MixedDeployment) -> None:
        super().__init__(
            deployment.cluster,
            deployment.names("prefill_worker", "decode_worker"),
            deployment.names("kv_indexer"),
        )

    async def right(self) -> None:
        """Returns once every indexer holds what the workers hold, by their own comparison."""
        await self.until_right(await self.positions(), time.monotonic(), RIGHT_SECONDS)

    def recovered(self, deployment: MixedDeployment, kind: str) -> dict[str, float]:
        """How often each indexer has taken what it asked a worker for."""
        name = "switchgear_kv_indexer_recoveries_total"
        return {
            indexer: deployment.metric(indexer, name, kind=kind, outcome="taken")
            for indexer in self.indexers
        }


async def serves_together(deployment: MixedDeployment, client: Client) -> None:
    """Everything that services need of one another works."""
    moved = "switchgear_worker_kv_transfer_blocks_total"
    workers = deployment.names("decode_worker")
    before = sum(deployment.metric(name, moved) for name in workers)
    prompt = new_prompt(LONG_TOKENS)
    served = await client.ask(prompt, 5)
    assert served.prefill_worker is not None
    assert sum(deployment.metric(name, moved) for name in workers) > before

    for worker in workers:
        prompt = await prompt_held_by(deployment, worker)
        served = await client.ask([*prompt, *new_prompt(20)], 5)
        assert served == Served(None, worker, LONG_TOKENS)

    await client.leave_at_the_first_token(new_prompt(LONG_TOKENS))
    await eventually(lambda: is_idle(deployment))


async def prompt_held_by(deployment: MixedDeployment, worker: str) -> list[int]:
    """A prompt that a decode worker has computed. No router sent it, so KV events alone tell of
    it, and have done so."""
    prompt = new_prompt(LONG_TOKENS)
    async with deployment.channel(worker) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)
        )
        generation = generation_pb2.Generation(
            request_id="directly",
            model=deployment.model,
            token_ids=prompt,
            stopping=generation_pb2.StoppingOptions(max_tokens=1),
        )
        request = decode_worker_pb2.GenerateRequest(generation=generation)
        assert [response async for response in stub.Generate(request, timeout=30)]
    await Index(deployment).right()
    return prompt


async def is_idle(deployment: MixedDeployment) -> bool:
    for worker in deployment.names("prefill_worker", "decode_worker"):
        async with deployment.channel(worker) as channel:
            stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(
                channel
            )
            status = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
            if status.request_ids or status.load.active_kv_blocks:
                return False
    return True


async def index_recovers(deployment: MixedDeployment, client: Client) -> None:
    """Lost events are asked of the workers again, and a new indexer asks for all they hold."""
    index = Index(deployment)
    await index.right()
    before = index.recovered(deployment, "batches")
    deployment.cluster.kill("nats-0", signal.SIGKILL)
    await asyncio.gather(*(client.ask(new_prompt(LONG_TOKENS), 1) for _ in range(4)))
    await index.restart("nats-0")
    await index.right()
    after = index.recovered(deployment, "batches")
    assert all(after[name] > before[name] for name in index.indexers)

    await asyncio.gather(*map(index.restart, index.indexers))
    await index.right()
    assert all(index.recovered(deployment, "snapshot").values())


@pytest.mark.parametrize("component", SERVICES)
async def test_a_service_is_updated_before_the_others_while_requests_run(
    deployment: MixedDeployment, client: Client, component: Component
) -> None:
    await deployment.set_all(Version.PREVIOUS)
    await rolled(deployment, client, component)
    await serves_together(deployment, client)
    if component == "kv_indexer":
        await index_recovers(deployment, client)


@pytest.mark.parametrize("component", SERVICES)
async def test_a_service_is_updated_after_the_others_while_requests_run(
    deployment: MixedDeployment, client: Client, component: Component
) -> None:
    await deployment.set_apart(component, Version.PREVIOUS)
    await serves_together(deployment, client)
    if component == "kv_indexer":
        await index_recovers(deployment, client)
    await rolled(deployment, client, component)


async def rolled(deployment: MixedDeployment, client: Client, component: Component) -> None:
    """Replaces a service's processes by those of the other version, with requests on their way."""
    first, second = deployment.names(component)
    async with under_load(client) as load:
        await deployment.roll(first)
    async with AsyncExitStack() as stack:
        if component == "decode_worker":
            await stack.enter_async_context(an_answer_moves(deployment, client, second))
        await stack.enter_async_context(under_load(client))
        await deployment.roll(second)
    assert load.answers
    assert load.prefilled_elsewhere
    assert load.from_cache


@asynccontextmanager
async def an_answer_moves(
    deployment: MixedDeployment, client: Client, worker: str
) -> AsyncIterator[None]:
    """The worker has begun an answer when the body runs, and another one finishes it."""
    prompt = [*await prompt_held_by(deployment, worker), *new_prompt(5)]
    before = migrations(deployment)
    begun = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(client.ask(prompt, LONG_ANSWER_TOKENS, begun))
        await begun.wait()
        yield
    assert answer.result().decode_worker == worker
    assert migrations(deployment) > before


def migrations(deployment: MixedDeployment) -> float:
    """How many requests were given to another worker, as the frontends count."""
    name = "switchgear_frontend_migrations_total"
    return sum(deployment.metric(frontend, name) for frontend in deployment.names("frontend"))
