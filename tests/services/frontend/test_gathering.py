from __future__ import annotations

import asyncio

import pytest

from services.frontend import gathering
from services.frontend.gathering import Gathering


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, instead of waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("services.frontend.gathering.asyncio.sleep", sleep)
    return waited


async def test_the_first_message_goes_at_once(waits: list[float]) -> None:
    await Gathering().before_sending()
    assert waits == []


async def test_what_follows_closely_waits_for_company(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    sender = Gathering()
    sender.sent()
    now += gathering.BUSY_SECONDS / 2
    await sender.before_sending()
    assert waits == [gathering.GATHER_SECONDS]
    sender.sent()
    now += gathering.BUSY_SECONDS * 2
    await sender.before_sending()
    assert waits == [gathering.GATHER_SECONDS]
