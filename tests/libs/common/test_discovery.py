"""Discovery against a real etcd."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aetcd
import pytest
from structlog.testing import capture_logs

from libs.common import discovery
from libs.common.discovery import Discovery, Table, new_instance_id
from switchgear.discovery.v1 import discovery_pb2
from tests.fixtures.eventually import until
from tests.fixtures.servers import ServerProcess

WORKER = discovery_pb2.Instance(
    instance_id=0xAB, role=discovery_pb2.ROLE_DECODE_WORKER, name="w", address="127.0.0.1:1"
)
CARD = discovery_pb2.ModelCard(
    instance_id=0xAB, role=discovery_pb2.ROLE_DECODE_WORKER, model="org/some model"
)


@pytest.fixture(autouse=True)
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LEASE_SECONDS", 2)
    monkeypatch.setattr(discovery, "KEEP_ALIVE_SECONDS", 0.3)
    monkeypatch.setattr(discovery, "SILENT_SECONDS", 0.5)


async def test_what_is_registered_is_seen_and_gone_at_once_when_it_leaves(
    etcd_server: ServerProcess,
) -> None:
    there = Discovery(etcd_server.url, "ns")
    async with (
        there.watching("instances/", discovery_pb2.Instance) as instances,
        there.watching("models/", discovery_pb2.ModelCard) as cards,
    ):
        async with there.registered(WORKER, [CARD]):
            await until(lambda: bool(instances.entries) and bool(cards.entries))
            assert instances.entries == {("decode_worker", f"{0xAB:016x}"): WORKER}
            assert cards.entries == {("org/some model", f"{0xAB:016x}"): CARD}
        await until(lambda: not instances.entries and not cards.entries)


async def test_namespaces_do_not_see_each_other(
    etcd_server: ServerProcess,
) -> None:
    url = etcd_server.url
    mine, other = Discovery(url, "mine"), Discovery(url, "other")
    async with (
        mine.registered(WORKER),
        mine.watching("instances/", discovery_pb2.Instance) as seen,
        other.watching("instances/", discovery_pb2.Instance) as unseen,
    ):
        await until(lambda: bool(seen.entries))
        await unseen.was_read.wait()
        assert not unseen.entries


async def test_a_key_that_is_no_text_ends_no_watch(etcd_server: ServerProcess) -> None:
    there, where = Discovery(etcd_server.url, "ns"), urlsplit(etcd_server.url)
    async with there.watching("instances/", discovery_pb2.Instance) as before:
        await before.was_read.wait()
        async with aetcd.Client(host=where.hostname, port=where.port) as client:
            await client.put(b"/switchgear/v1/ns/instances/\xff", b"{}")
        async with (
            there.watching("instances/", discovery_pb2.Instance) as after,
            there.registered(WORKER),
        ):
            await until(lambda: WORKER in before.values() and WORKER in after.values())


async def test_a_watch_that_starts_before_etcd_is_told_when_it_comes(
    etcd_server: ServerProcess,
) -> None:
    server = etcd_server
    server.stop()
    there = Discovery(server.url, "ns")
    async with (
        there.watching("instances/", discovery_pb2.Instance) as instances,
        there.registered(WORKER),
    ):
        assert not instances.was_read.is_set()
        server.start()
        await until(lambda: bool(instances.entries))


async def test_an_etcd_restart_is_outlived(etcd_server: ServerProcess) -> None:
    server = etcd_server
    there = Discovery(server.url, "ns")
    late = discovery_pb2.Instance(instance_id=2, role=discovery_pb2.ROLE_ROUTER, name="late")
    async with there.watching("instances/", discovery_pb2.Instance) as instances:
        changes: list[int] = []
        instances.on_change(lambda: changes.append(len(instances.entries)))
        with capture_logs() as logs:
            async with there.registered(WORKER):
                await until(lambda: len(instances.entries) == 1)
                server.stop()
                await until(lambda: any(each["event"] == "etcd unavailable" for each in logs))
                server.start()
                async with there.registered(late):
                    await until(lambda: len(instances.entries) == 2)
                await until(lambda: len(instances.entries) == 1)
                # Never was it believed that the worker had gone.
                assert 0 not in changes
            told = [each["event"] for each in logs if each["event"].startswith("etcd ")]
            assert told == ["etcd unavailable", "etcd available again"]


async def test_one_that_died_during_an_outage_is_dropped_after_a_lease(
    etcd_server: ServerProcess,
) -> None:
    server = etcd_server
    there = Discovery(server.url, "ns")
    async with there.watching("instances/", discovery_pb2.Instance) as instances:
        task = asyncio.create_task(_register_until_cancelled(there))
        await until(lambda: bool(instances.entries))
        server.stop()
        task.cancel()
        await asyncio.wait([task])
        assert instances.entries
        server.start()
        await until(lambda: not instances.entries)


async def test_an_etcd_that_hangs_until_leases_have_ended_is_outlived(
    etcd_server: ServerProcess,
) -> None:
    there = Discovery(etcd_server.url, "ns")
    async with there.watching("instances/", discovery_pb2.Instance) as instances:
        changes: list[int] = []
        instances.on_change(lambda: changes.append(len(instances.entries)))
        async with there.registered(WORKER):
            await until(lambda: bool(instances.entries))
            before = instances.revision
            with etcd_server.frozen():
                # Leases end by etcd's clock, which goes on.
                await asyncio.sleep(discovery.LEASE_SECONDS + 1)
            # It is gone, and there again.
            await until(lambda: instances.revision >= before + 2)
            assert instances.entries
        assert 0 not in changes


async def test_a_worker_that_dies_while_etcd_answers_is_dropped_with_its_lease(
    etcd_server: ServerProcess,
) -> None:
    there, where = Discovery(etcd_server.url, "ns"), urlsplit(etcd_server.url)
    watcher = discovery_pb2.Instance(instance_id=2, role=discovery_pb2.ROLE_ROUTER)
    async with (
        there.registered(watcher),
        there.watching("instances/", discovery_pb2.Instance) as instances,
        aetcd.Client(host=where.hostname, port=where.port) as client,
    ):
        lease = await client.lease(discovery.LEASE_SECONDS)
        key = f"/switchgear/v1/ns/instances/decode_worker/{WORKER.instance_id:016x}"
        await client.put(key.encode(), b"{}", lease=lease)
        await until(lambda: len(instances.entries) == 2)
        # Nobody keeps its lease alive.
        await until(lambda: len(instances.entries) == 1)


async def _register_until_cancelled(there: Discovery) -> None:
    async with there.registered(WORKER):
        await asyncio.Event().wait()


def test_listeners_hear_of_changes_only() -> None:
    table: Table[discovery_pb2.Instance] = Table()
    heard: list[int] = []
    table.on_change(lambda: heard.append(1))
    table.replace({("a",): WORKER})
    table.replace({("a",): WORKER})
    assert heard == [1]


def test_ids_are_never_zero() -> None:
    assert all(0 < new_instance_id() < 2**64 for _ in range(100))
