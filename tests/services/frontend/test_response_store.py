"""The store of responses, on a real NATS server: what it keeps, for whom, how much, how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats.aio.client import Client

from libs.common.errors import ResponsesUnavailable
from libs.common.nats_client import connecting
from services.frontend import response_store
from services.frontend.response_store import ResponseStore, StoreLimits
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import ServerProcess

LIMITS = StoreLimits(total_bytes=1 << 24, responses=1000, seconds=3600, response_bytes=1_000_000)


def response_id(number: int) -> str:
    return f"resp-{number:032x}"


@asynccontextmanager
async def store(
    server: ServerProcess, limits: StoreLimits = LIMITS, namespace: str = "default"
) -> AsyncIterator[ResponseStore]:
    async with connecting(server.url, "test") as client:
        await until(lambda: client.is_connected)
        yield ResponseStore(client, namespace, limits)


async def test_what_one_puts_all_find_until_it_is_deleted(jetstream_server: ServerProcess) -> None:
    async with store(jetstream_server) as one, store(jetstream_server) as other:
        await one.put("a", response_id(1), b"value")
        assert await other.get("a", response_id(1)) == b"value"
        assert await other.delete("a", response_id(1))
        assert await one.get("a", response_id(1)) is None
        assert not await one.delete("a", response_id(1))


async def test_what_is_anothers_is_not_there(jetstream_server: ServerProcess) -> None:
    async with (
        store(jetstream_server) as ours,
        store(jetstream_server, namespace="theirs") as theirs,
    ):
        await ours.put("a.>", response_id(1), b"value")
        for tenant in ("", "b", "a", "*", ">", "a.*"):
            assert await ours.get(tenant, response_id(1)) is None
            assert not await ours.delete(tenant, response_id(1))
        assert await theirs.get("a.>", response_id(1)) is None
        assert await ours.get("a.>", response_id(1)) == b"value"


@pytest.mark.parametrize(
    "name", ["", "*", ">", "resp-*", "resp-1", response_id(1) + ".x", "é\x00 "]
)
async def test_an_id_that_was_never_given_finds_nothing(
    jetstream_server: ServerProcess, name: str
) -> None:
    async with store(jetstream_server) as kept:
        await kept.put("a", response_id(1), b"value")
        assert await kept.get("a", name) is None
        assert not await kept.delete("a", name)


async def test_the_oldest_make_room_for_new_ones_in_number(jetstream_server: ServerProcess) -> None:
    limits = StoreLimits(total_bytes=1 << 24, responses=3, seconds=3600, response_bytes=1000)
    async with store(jetstream_server, limits) as kept:
        for number in range(5):
            await kept.put("a", response_id(number), b"value")
        found = [await kept.get("a", response_id(number)) for number in range(5)]
        assert found == [None, None, b"value", b"value", b"value"]


async def test_the_oldest_make_room_for_new_ones_in_bytes(jetstream_server: ServerProcess) -> None:
    limits = StoreLimits(total_bytes=50_000, responses=1000, seconds=3600, response_bytes=20_000)
    async with store(jetstream_server, limits) as kept:
        for number in range(5):
            await kept.put("a", response_id(number), b"x" * 20_000)
        found = [await kept.get("a", response_id(number)) for number in range(5)]
        assert [value is not None for value in found] == [False, False, False, True, True]


async def test_what_is_old_is_gone(jetstream_server: ServerProcess) -> None:
    limits = StoreLimits(total_bytes=1 << 24, responses=1000, seconds=0.5, response_bytes=1000)
    async with store(jetstream_server, limits) as kept:
        await kept.put("a", response_id(1), b"value")
        assert await kept.get("a", response_id(1)) == b"value"

        async def is_gone() -> bool:
            return await kept.get("a", response_id(1)) is None

        await eventually(is_gone)


async def test_the_largest_value_comes_back(jetstream_server: ServerProcess) -> None:
    async with store(jetstream_server) as kept:
        value = b"\x00\xff" * (LIMITS.response_bytes // 2)
        await kept.put("a", response_id(1), value)
        assert await kept.get("a", response_id(1)) == value
        with pytest.raises(ResponsesUnavailable):
            await kept.put("a", response_id(2), value + b"xx")


async def test_other_limits_hold_from_the_next_start_on(jetstream_server: ServerProcess) -> None:
    async with store(jetstream_server) as kept:
        for number in range(3):
            await kept.put("a", response_id(number), b"value")
    fewer = StoreLimits(total_bytes=1 << 24, responses=1, seconds=60, response_bytes=1000)
    async with store(jetstream_server, fewer) as kept:
        await kept.check()
        found = [await kept.get("a", response_id(number)) for number in range(3)]
        assert found == [None, None, b"value"]


async def test_a_server_that_restarts_has_all_that_was_kept(
    jetstream_server: ServerProcess,
) -> None:
    async with store(jetstream_server) as kept:
        await kept.put("a", response_id(1), b"value")
        jetstream_server.stop()
        with pytest.raises(ResponsesUnavailable) as refusal:
            await kept.get("a", response_id(1))
        assert refusal.value.retry_after_seconds
        with pytest.raises(ResponsesUnavailable):
            await kept.put("a", response_id(2), b"value")
        with pytest.raises(ResponsesUnavailable):
            await kept.delete("a", response_id(1))
        with pytest.raises(ResponsesUnavailable):
            await kept.check()
        jetstream_server.start()

        async def is_back() -> bool:
            try:
                return await kept.get("a", response_id(1)) == b"value"
            except ResponsesUnavailable:
                return False

        await eventually(is_back)


async def test_a_stream_that_is_gone_is_made_again(jetstream_server: ServerProcess) -> None:
    async with store(jetstream_server) as kept:
        await kept.put("a", response_id(1), b"value")
        async with connecting(jetstream_server.url, "operator") as client:
            await until(lambda: client.is_connected)
            await client.jetstream().delete_stream("switchgear_default_responses")
        assert await kept.get("a", response_id(1)) is None
        await kept.check()
        await kept.put("a", response_id(2), b"value")
        assert await kept.get("a", response_id(2)) == b"value"


async def test_a_server_without_jetstream_keeps_nothing_and_says_so(
    nats_server: ServerProcess,
) -> None:
    async with store(nats_server) as kept:
        for call in (
            kept.check(),
            kept.put("a", response_id(1), b"v"),
            kept.get("a", response_id(1)),
        ):
            with pytest.raises(ResponsesUnavailable):
                await call


async def test_calls_at_the_same_time_are_bounded(
    jetstream_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_store, "MAX_CALLS", 4)
    async with store(jetstream_server) as kept:
        await kept.check()
        reads = (kept.get("a", response_id(number)) for number in range(10))
        found = await asyncio.gather(*reads, return_exceptions=True)
        assert [*map(type, found)] == [type(None)] * 4 + [ResponsesUnavailable] * 6
        assert await kept.get("a", response_id(1)) is None


async def test_a_server_that_never_came_is_not_waited_for() -> None:
    kept = ResponseStore(Client(), "default", LIMITS)
    with pytest.raises(ResponsesUnavailable):
        await kept.get("a", response_id(1))
