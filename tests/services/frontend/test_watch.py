"""Ending a body from outside."""

from __future__ import annotations

import asyncio

import pytest

from libs.common.errors import DeadlineExceeded
from services.frontend.watch import ClientLeft, Connection, Watch


def in_a_minute() -> float:
    return asyncio.get_running_loop().time() + 60


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_a_body_ends_at_its_deadline() -> None:
    with pytest.raises(DeadlineExceeded), Watch(asyncio.get_running_loop().time()):
        await for_ever()


async def test_the_owner_says_what_being_late_means() -> None:
    now = asyncio.get_running_loop().time()
    with pytest.raises(ValueError, match="slow"), Watch(now, late=lambda: ValueError("slow")):
        await for_ever()


async def test_a_body_ends_when_its_client_leaves() -> None:
    connection = Connection()
    asyncio.get_running_loop().call_soon(connection.lose)
    with pytest.raises(ClientLeft), Watch(in_a_minute(), connection):
        await for_ever()


async def test_a_body_does_not_begin_for_a_client_that_has_left() -> None:
    connection = Connection()
    connection.lose()
    with pytest.raises(ClientLeft), Watch(in_a_minute(), connection):
        pytest.fail("the body ran")


async def test_a_body_that_ends_by_itself_is_left_alone_afterwards() -> None:
    connection = Connection()
    with Watch(in_a_minute(), connection):
        pass
    connection.lose()
    await asyncio.sleep(0)


async def test_the_first_of_two_endings_counts() -> None:
    connection = Connection()
    loop = asyncio.get_running_loop()
    loop.call_soon(connection.lose)
    with pytest.raises(ClientLeft), Watch(loop.time(), connection):
        await for_ever()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_the_inner_watch_ends_the_inner_body_only() -> None:
    loop = asyncio.get_running_loop()
    with Watch(in_a_minute()):
        with pytest.raises(DeadlineExceeded), Watch(loop.time()):
            await for_ever()
        await asyncio.sleep(0)


async def test_cancelling_the_task_stays_a_cancellation() -> None:
    connection = Connection()

    async def watched() -> None:
        with Watch(in_a_minute(), connection):
            await for_ever()

    task = asyncio.create_task(watched())
    await asyncio.sleep(0)
    task.cancel()
    connection.lose()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_body_goes_out_as_it_is() -> None:
    with pytest.raises(KeyError), Watch(in_a_minute(), Connection()):
        raise KeyError
