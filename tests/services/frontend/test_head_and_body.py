"""An answer's head leaves with what follows it."""

from __future__ import annotations

import asyncio
from typing import cast

from services.frontend.http_protocol import HeadHoldingTransport


class Wire:
    """A transport that tells what was written, each system call by itself."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.writes.append(data)

    def close(self) -> None:
        self.is_closed = True


def holding(wire: Wire) -> HeadHoldingTransport:
    transport = cast(asyncio.Transport, wire)
    return HeadHoldingTransport(transport, asyncio.get_running_loop())


async def test_a_head_and_the_first_of_its_body_are_one_write() -> None:
    wire = Wire()
    transport = holding(wire)
    for _ in range(2):  # A connection has one answer after the other.
        transport.begin_answer()
        transport.write(b"head ")
        transport.write(b"body ")
        transport.write(b"rest")
    assert wire.writes == [b"head body ", b"rest"] * 2


async def test_a_head_without_a_body_for_now_leaves_by_itself() -> None:
    wire = Wire()
    transport = holding(wire)
    transport.begin_answer()
    transport.write(b"head")
    assert not wire.writes
    await asyncio.sleep(0)
    transport.write(b"body")
    assert wire.writes == [b"head", b"body"]


async def test_a_head_leaves_before_the_connection_is_closed() -> None:
    wire = Wire()
    transport = holding(wire)
    transport.begin_answer()
    transport.write(b"head")
    transport.close()
    await asyncio.sleep(0)
    assert wire.writes == [b"head"]
    assert wire.is_closed
