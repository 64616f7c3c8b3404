"""Requests begin a few at a time."""

from __future__ import annotations

import asyncio

from services.frontend.intake import AT_A_TIME, Intake


async def begun_by_turn(requests: int) -> list[list[int]]:
    """Which of so many requests that came at once began in which turn of the event loop."""
    intake = Intake()
    turns: list[list[int]] = [[]]

    async def request(number: int) -> None:
        await intake.turn()
        turns[-1].append(number)

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(request(number)) for number in range(requests)]
        while not all(task.done() for task in running):
            await asyncio.sleep(0)
            turns.append([])
    return [turn for turn in turns if turn]


async def test_one_that_comes_alone_does_not_wait() -> None:
    turn = Intake().turn()
    try:
        turn.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


async def test_of_many_so_many_begin_in_a_turn_and_all_in_the_order_in_which_they_came() -> None:
    turns = await begun_by_turn(3 * AT_A_TIME + 1)
    assert [number for turn in turns for number in turn] == list(range(3 * AT_A_TIME + 1))
    assert [len(turn) for turn in turns] == [AT_A_TIME, AT_A_TIME, AT_A_TIME, 1]


async def test_others_have_their_turns_meanwhile() -> None:
    intake = Intake()
    happened: list[str] = []

    async def request() -> None:
        await intake.turn()
        happened.append("begun")

    async def streams() -> None:
        for _ in range(4):
            happened.append("token")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(2 * AT_A_TIME):
            group.create_task(request())
        group.create_task(streams())
    assert "token" in happened[AT_A_TIME : happened.index("begun", AT_A_TIME)]


async def test_one_that_is_given_up_takes_nobodys_place() -> None:
    intake = Intake()
    turns = [asyncio.create_task(intake.turn()) for _ in range(3 * AT_A_TIME)]
    given_up = turns[AT_A_TIME : 2 * AT_A_TIME]
    await asyncio.sleep(0)  # All have asked, and the first have begun.
    for turn in given_up:
        turn.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait(turns)
    assert [turn for turn in turns if turn.cancelled()] == given_up
