"""When a router knows its workers, over real gRPC, with tables in place of etcd."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.router.fleet import Fleet
from switchgear.discovery.v1 import discovery_pb2
from tests.fixtures.eventually import WAIT_SECONDS
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
