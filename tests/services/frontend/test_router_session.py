"""Sessions with routers: who gets a request, what goes into a message, what comes after a break."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from libs.common.discovery import Table
from libs.common.errors import NoLiveInstance, WorkerLost
from services.frontend.router_session import Inbox, RouterSessions
from switchgear.common.v1 import generation_pb2, outputs_pb2
from switchgear.discovery.v1 import discovery_pb2
from switchgear.router.v1 import router_pb2
from tests.fixtures.eventually import until
from tests.services.frontend.fake_router import LENGTH, Call, FakeRouter, fake_router, never_answers

WINDOW = 8


@asynccontextmanager
async def sessions_with(
    *routers: FakeRouter,
) -> AsyncIterator[tuple[RouterSessions, Table[discovery_pb2.Instance]]]:
    """Sessions with these routers, all connected."""
    table: Table[discovery_pb2.Instance] = Table()
    sessions = RouterSessions(WINDOW)
    async with sessions.following(table):
        listing(table, *routers)
        await until(lambda: all(router.sessions for router in routers))
        await until(lambda: sessions.is_connected)
        yield sessions, table


def listing(table: Table[discovery_pb2.Instance], *routers: FakeRouter) -> None:
    table.replace({(router.instance.name,): router.instance for router in routers})


def submit(sessions: RouterSessions, name: str = "r") -> Inbox:
    generation = generation_pb2.Generation(request_id=name, token_ids=[1])
    return sessions.submit(
        router_pb2.RoutingRequest(request_id=name), generation.SerializeToString()
    )


async def test_requests_are_spread_by_what_each_router_has() -> None:
    async with AsyncExitStack() as stack:
        names = ("a", "b", "c")
        routers = [
            await stack.enter_async_context(fake_router(never_answers, name)) for name in names
        ]
        sessions, _ = await stack.enter_async_context(sessions_with(*routers))
        for _ in range(9):
            submit(sessions)
        await until(lambda: [len(router.calls) for router in routers] == [3, 3, 3])


async def test_what_is_ready_together_goes_together() -> None:
    async def say_nothing(call: Call) -> None:
        pass

    async with fake_router(say_nothing) as router, sessions_with(router) as (sessions, _):
        inboxes = [submit(sessions) for _ in range(10)]
        await until(lambda: len(router.calls) == 10)
        for inbox in inboxes:
            inbox.close()
        await until(lambda: len(router.cancelled_handles) == 10)
        first, submits, cancels = router.sessions[0].requests
        assert first.window_responses == WINDOW
        assert (len(submits.submits), len(cancels.cancels)) == (10, 10)


async def test_a_request_given_up_before_it_was_sent_is_never_sent() -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        submit(sessions, "kept").close()
        submit(sessions, "sent")
        await until(lambda: router.calls)
        assert [call.generation.request_id for call in router.calls] == ["sent"]
        assert not router.sessions[0].requests[-1].cancels


async def test_consumed_responses_are_counted_often_enough_for_the_window() -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        submit(sessions)
        await until(lambda: router.calls)
        requests = router.sessions[0].requests
        for total in range(1, 100):
            router.calls[0].send([total])
            least = total - WINDOW
            await until(lambda least=least: requests[-1].consumed_responses > least)  # type: ignore[misc]


async def test_tokens_that_were_not_read_come_together() -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        inbox = submit(sessions)
        await until(lambda: router.calls)
        call = router.calls[0]
        for token in range(20):
            call.send([token])
        call.send([20, 21], LENGTH)
        await until(lambda: inbox.is_over)
        assert await inbox.take() == list(range(22))
        assert inbox.finish_reason == LENGTH


async def test_one_message_can_hold_tokens_of_many_requests() -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        inboxes = [submit(sessions) for _ in range(3)]
        await until(lambda: len(router.calls) == 3)
        handles = [inbox.handle for inbox in inboxes]
        plain = outputs_pb2.StepOutputs(handles=[*handles, 999], token_ids=[10, 20, 30, 99])
        counted = outputs_pb2.StepOutputs(
            handles=[handles[0], 999, handles[2], handles[0]],
            token_counts=[2, 1, 0, 1],
            token_ids=[11, 12, 99, 13],
        )
        router.sessions[0].send(
            router_pb2.SessionResponse(
                outputs=[plain.SerializeToString(), counted.SerializeToString()]
            )
        )
        assert [await inbox.take() for inbox in inboxes] == [[10, 11, 12, 13], [20], [30]]


@pytest.mark.parametrize(
    "outputs",
    [
        outputs_pb2.StepOutputs(handles=[1, 1], token_ids=[5]).SerializeToString(),
        outputs_pb2.StepOutputs(
            handles=[1], token_counts=[1, 2], token_ids=[5] * 3
        ).SerializeToString(),
        b"\xff\xff",
    ],
)
async def test_a_router_that_breaks_the_protocol_loses_its_session(outputs: bytes) -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        inbox = submit(sessions)
        await until(lambda: router.calls)
        router.sessions[0].send(router_pb2.SessionResponse(outputs=[outputs]))
        await until(lambda: inbox.is_over)
        assert isinstance(inbox.error, WorkerLost)
        await until(lambda: len(router.sessions) == 2)


async def test_a_broken_session_fails_its_requests_and_is_made_again() -> None:
    async with fake_router(never_answers) as router, sessions_with(router) as (sessions, _):
        inbox = submit(sessions)
        await until(lambda: router.calls)
        router.calls[0].send([1, 2])
        router.break_sessions()
        await until(lambda: inbox.is_over)
        assert await inbox.take() == [1, 2]
        assert isinstance(inbox.error, WorkerLost)
        await until(lambda: len(router.sessions) == 2)
        await until(lambda: sessions.is_connected)
        submit(sessions, "next")
        await until(lambda: router.calls[-1].generation.request_id == "next")


async def test_a_router_that_left_discovery_keeps_what_it_has_and_gets_no_more() -> None:
    async with (
        fake_router(never_answers, "old") as old,
        sessions_with(old) as (sessions, table),
        fake_router(never_answers, "new") as new,
    ):
        inbox = submit(sessions)
        await until(lambda: old.calls)
        listing(table, new)
        await until(lambda: new.sessions)
        await until(lambda: sessions.is_connected)
        submit(sessions)
        await until(lambda: new.calls)
        old.calls[0].send([7], LENGTH)
        assert await inbox.take() == [7]
        assert inbox.finish_reason == LENGTH


async def test_without_a_router_nothing_is_submitted() -> None:
    sessions = RouterSessions(WINDOW)
    with pytest.raises(NoLiveInstance):
        submit(sessions)
    with pytest.raises(NoLiveInstance):
        await sessions.wait_connected(0.01)


async def test_a_router_that_comes_back_is_used_again() -> None:
    async def answer(call: Call) -> None:
        call.send([1], LENGTH)

    async with fake_router(answer) as router, sessions_with(router) as (sessions, table):
        listing(table)
        with pytest.raises(NoLiveInstance):
            submit(sessions)
        listing(table, router)
        await until(lambda: sessions.is_connected)
        inbox = submit(sessions)
        await until(lambda: inbox.is_over)
        assert await inbox.take() == [1]
