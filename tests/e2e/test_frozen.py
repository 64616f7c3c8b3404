"""Processes that are there and do nothing, as on a machine that hangs: no connection is closed, no
error comes, and who waits for them must find out by itself. Every answer is checked."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests.e2e.right_answers import Client, Frontends, Load, under_load
from tests.e2e.running import Running, running
from tests.fixtures.eventually import eventually

FROZEN = (
    "decode_worker-1",
    "prefill_worker-1",
    "router-1",
    "kv_indexer-1",
    "nats-0",
    "etcd-0",
)
"""At the same time. Of the first four there is another one."""


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        sim_step_ms=10,
        prefill=2,
        decode=2,
        routers=2,
        indexers=2,
    ) as it:
        yield it


@pytest.fixture
async def client(deployment: Running, tokenizer_folder: Path) -> AsyncIterator[Client]:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    async with httpx.AsyncClient(timeout=60) as http:
        yield Client(http, Frontends({"all": deployment.url}), deployment.model, tokenizer)


@contextmanager
def frozen(deployment: Running, names: tuple[str, ...]) -> Iterator[None]:
    """They do nothing while the body runs."""
    try:
        for name in names:
            deployment.cluster.kill(name, signal.SIGSTOP)
        yield
    finally:
        for name in names:
            deployment.cluster.kill(name, signal.SIGCONT)


async def answered(load: Load, answers: int) -> None:
    """Returns when so many more have come."""
    wanted = load.answers + answers

    async def are_there() -> bool:
        return load.answers >= wanted

    await eventually(are_there)


@pytest.mark.parametrize("names", [FROZEN, ("decode_worker-0", "prefill_worker-0", "router-0")])
async def test_what_freezes_costs_time_and_no_answer(
    deployment: Running, client: Client, names: tuple[str, ...]
) -> None:
    before = deployment.metric("frontend-0", "switchgear_frontend_migrations_total")
    async with under_load(client) as load:
        await answered(load, 8)
        with frozen(deployment, names):
            # Each client is soon with those that still work.
            await answered(load, 40)
        await answered(load, 8)
    assert load.prefilled_elsewhere
    assert deployment.metric("frontend-0", "switchgear_frontend_migrations_total") > before
