"""When a router knows its workers, over real gRPC, with tables in place of etcd."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from services.router.fleet import Fleet
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2
from tests.fixtures.eventually import WAIT_SECONDS, until
from tests.services.router.standing import DECODE, PREFILL, Stand, standing


@asynccontextmanager
async def another_fleet(stand: Stand) -> AsyncIterator[Fleet]:
    """As of a router that has just started."""
    fleet = Fleet(stand.instances, stand.cards)
    try:
        yield fleet
    finally:
        await fleet.close()


def list_at(stand: Stand, name: str, address: str) -> None:
    """Puts a worker into discovery, whoever is at that address."""
    instance = discovery_pb2.Instance(
        instance_id=77, role=discovery_pb2.ROLE_DECODE_WORKER, name=name, address=address
    )
    card = discovery_pb2.ModelCard(
        instance_id=77, role=instance.role, model="test-model", kv_block_size_tokens=16
    )
    stand.instances.replace({**stand.instances.entries, (name,): instance})
    stand.cards.replace({**stand.cards.entries, (name,): card})


async def test_it_is_settled_once_every_worker_has_answered() -> None:
    async with standing() as stand:
        await stand.add(PREFILL, "p")
        await stand.add(DECODE, "d")
        async with another_fleet(stand) as fleet:
            assert not any(worker.is_available for worker in fleet.workers)
            await fleet.settled(WAIT_SECONDS)
            assert [worker.is_available for worker in fleet.workers] == [True, True]


async def test_a_worker_that_is_not_there_does_not_hold_it_up() -> None:
    async with standing() as stand:
        await stand.add(DECODE, "d")
        list_at(stand, "gone", "127.0.0.1:1")
        async with another_fleet(stand) as fleet, asyncio.timeout(WAIT_SECONDS):
            await fleet.settled(2 * WAIT_SECONDS)
            assert {worker.name for worker in fleet.workers if worker.is_available} == {"d"}


async def test_a_worker_that_hangs_holds_it_up_for_so_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host, port = deaf.getsockname()
        async with standing() as stand:
            list_at(stand, "hangs", f"{host}:{port}")
            async with another_fleet(stand) as fleet, asyncio.timeout(WAIT_SECONDS):
                await fleet.settled(0.05)
                assert not any(worker.is_available for worker in fleet.workers)


def enlist(
    stand: Stand, number: int, *, files_checksum: str = "a", block_size_tokens: int = 16
) -> None:
    """Puts a decode worker into discovery that is younger than those of lower numbers. Nobody is
    there: who fits a model is known before."""
    instance = discovery_pb2.Instance(
        instance_id=number, role=DECODE, name=f"d{number}", address="127.0.0.1:1"
    )
    card = discovery_pb2.ModelCard(
        instance_id=number,
        role=DECODE,
        model="m",
        kv_block_size_tokens=block_size_tokens,
        files_checksum=files_checksum,
        created_unix_seconds=number,
    )
    stand.enlist(instance, card)


async def degradations(stand: Stand) -> list[tuple[str, str]]:
    said = await stand.stub.ExplainDecision(router_pb2.ExplainDecisionRequest())
    return [(each.source, each.reason) for each in said.degradations]


def gauge(reason: str) -> float | None:
    return REGISTRY.get_sample_value("switchgear_router_degraded", {"reason": reason})


async def test_a_worker_that_does_not_fit_its_model_degrades_routing_from_when_it_joins() -> None:
    async with standing() as stand:
        enlist(stand, 1)
        assert await degradations(stand) == []
        enlist(stand, 2, files_checksum="b", block_size_tokens=32)
        assert await degradations(stand) == [
            ("d2", "block_size"),
            ("d2", "tokenizer_or_template"),
        ]
        assert gauge("block_size") == gauge("tokenizer_or_template") == 1
        stand.unlist("d2")
        await until(lambda: len(stand.fleet.members) == 1)
        assert await degradations(stand) == []
        assert gauge("block_size") == gauge("tokenizer_or_template") == 0


async def test_a_model_has_what_most_of_its_workers_have_however_old_the_others_are() -> None:
    async with standing() as stand:
        enlist(stand, 2, block_size_tokens=32)
        enlist(stand, 1)
        assert await degradations(stand) == [("d2", "block_size")]
        with capture_logs() as logs:
            enlist(stand, 3, block_size_tokens=32)
            enlist(stand, 4, block_size_tokens=32)
        assert await degradations(stand) == [("d1", "block_size")]
        [said] = [each for each in logs if each["event"] == "worker does not fit its model"]
        assert (said["worker"], said["log_level"]) == ("d1", "error")
        assert (said["block_size_tokens"], said["block_size_tokens_of_model"]) == (16, 32)
