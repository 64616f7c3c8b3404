"""Simulated engines in one event loop, pulling from one another over real TCP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from libs.common.errors import TransferFailed
from libs.engine.interface import EngineRequest, FinishReason, KvSession, Leg, RequestKey
from libs.engine.sim import transfer
from libs.engine.sim.core.scheduler import Pull, Scheduler
from libs.engine.sim.engine import SimEngine
from libs.engine.sim.settings import SimSettings
from tests.libs.engine.sim.core.driving import expected_tokens, request
from tests.libs.engine.sim.recording import RecordingSink

BLOCK_SIZE_TOKENS = 16
PROMPT = range(100)
PROMPT_BLOCKS = 7

StartEngine = Callable[..., Awaitable[tuple[SimEngine, RecordingSink]]]


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    async with AsyncExitStack() as closing:

        async def start(**settings: Any) -> tuple[SimEngine, RecordingSink]:
            engine = SimEngine(SimSettings(timing="fixed", step_ms=0.1, **settings))
            sink = RecordingSink()
            info = await engine.start(sink)
            assert info.transfer_backend == "sim"
            closing.push_async_callback(engine.close)
            return engine, sink

        yield start


def whole(key: int = 1, **others: Any) -> EngineRequest:
    values: dict[str, Any] = {"max_tokens": 40} | others
    return request(key, PROMPT, block_size_tokens=BLOCK_SIZE_TOKENS, **values)


async def test_an_engine_serves_requests_as_they_come(start_engine: StartEngine) -> None:
    engine, sink = await start_engine()
    engine.submit([whole(1), whole(2, seed=7)])
    await sink.until(lambda: sink.outcome.tokens)
    engine.submit([whole(3)])
    await sink.until(lambda: len(sink.outcome.finishes) == 3)
    for asked in (whole(1), whole(2, seed=7), whole(3)):
        assert sink.outcome.tokens[asked.key] == expected_tokens(asked, 40, BLOCK_SIZE_TOKENS)
        assert sink.outcome.finishes[asked.key].reason is FinishReason.LENGTH
    assert sink.events
    assert engine.load().active_kv_blocks == 0


async def test_an_idle_engine_takes_work_up_again(start_engine: StartEngine) -> None:
    engine, sink = await start_engine()
    for key in (1, 2):
        engine.submit([whole(key, max_tokens=1)])
        await sink.until(partial(sink.outcome.finishes.__contains__, key))
    assert sink.outcome.starts[RequestKey(2)].cached_tokens == 96


async def test_a_cancelled_request_is_never_heard_of_again(start_engine: StartEngine) -> None:
    engine, sink = await start_engine()
    engine.submit([whole(1, max_tokens=100_000), whole(2, max_tokens=100_000)])
    await sink.until(lambda: len(sink.outcome.tokens) == 2)
    engine.cancel([RequestKey(1), RequestKey(99)])
    produced = len(sink.outcome.tokens[1])
    await sink.until(lambda: len(sink.outcome.tokens[2]) > produced + 10)
    assert len(sink.outcome.tokens[1]) == produced
    assert 1 not in sink.outcome.finishes
    assert engine.load().running_requests == 1


async def test_a_bug_in_the_loop_is_reported_once(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sink = await start_engine()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Scheduler, "end_step", fail)
    engine.submit([whole()])
    await sink.until(lambda: sink.failure)
    assert isinstance(sink.failure, ExceptionGroup)
    assert sink.failure.subgroup(ZeroDivisionError)


async def test_closing_twice_or_before_the_start_is_safe() -> None:
    engine = SimEngine(SimSettings())
    await engine.close()
    await engine.start(RecordingSink())
    await engine.close()
    await engine.close()


# Disaggregation


async def computed(engine: SimEngine, sink: RecordingSink, key: int = 1) -> KvSession:
    engine.submit([whole(key, leg=Leg.PREFILL, max_tokens=1)])
    await sink.until(lambda: key in sink.outcome.prefilled)
    return sink.outcome.prefilled[key].kv_session


async def test_a_prompt_is_pulled_and_the_output_is_the_same(start_engine: StartEngine) -> None:
    prefill, prefill_sink = await start_engine()
    decode, sink = await start_engine()
    session = await computed(prefill, prefill_sink)
    assert prefill.load().active_kv_blocks == PROMPT_BLOCKS
    asked = whole(5, leg=Leg.DECODE, kv_session=session)
    decode.submit([asked])
    await sink.until(lambda: sink.outcome.finishes)
    assert sink.outcome.starts[5].transferred_tokens == 99
    assert sink.outcome.tokens[5] == expected_tokens(asked, 40, BLOCK_SIZE_TOKENS)
    assert prefill.load().active_kv_blocks == 0
    counters = decode.counters()
    assert counters.transferred_blocks == PROMPT_BLOCKS
    assert counters.transferred_bytes == PROMPT_BLOCKS * BLOCK_SIZE_TOKENS * 131_072
    assert counters.transfer_failures == 0


async def test_cached_blocks_are_not_pulled_again(start_engine: StartEngine) -> None:
    prefill, prefill_sink = await start_engine()
    decode, sink = await start_engine()
    for key in (1, 2):
        session = await computed(prefill, prefill_sink, key)
        decode.submit([whole(key, leg=Leg.DECODE, kv_session=session)])
        await sink.until(partial(sink.outcome.finishes.__contains__, key))
    start = sink.outcome.starts[2]
    assert (start.cached_tokens, start.transferred_tokens) == (96, 3)
    assert decode.counters().transferred_blocks == PROMPT_BLOCKS + 1


async def falls_back(decode: SimEngine, sink: RecordingSink, session: KvSession) -> None:
    asked = whole(5, leg=Leg.DECODE, kv_session=session)
    decode.submit([asked])
    await sink.until(lambda: sink.outcome.finishes)
    assert sink.outcome.starts[5].transferred_tokens == 0
    assert sink.outcome.tokens[5] == expected_tokens(asked, 40, BLOCK_SIZE_TOKENS)
    assert decode.counters().transfer_failures == 1
    assert decode.counters().transferred_bytes == 0


async def test_a_dead_peer_s_prompt_is_computed_here(start_engine: StartEngine) -> None:
    prefill, prefill_sink = await start_engine()
    session = await computed(prefill, prefill_sink)
    await prefill.close()
    await falls_back(*await start_engine(), session)


async def test_a_session_past_its_time_is_computed_here(start_engine: StartEngine) -> None:
    session = await computed(*await start_engine())
    await falls_back(*await start_engine(), replace(session, time_to_live_seconds=0.0))


async def test_a_session_that_the_peer_has_freed_is_computed_here(
    start_engine: StartEngine,
) -> None:
    prefill, prefill_sink = await start_engine()
    session = await computed(prefill, prefill_sink)
    prefill.cancel([RequestKey(1)])
    assert prefill.load().active_kv_blocks == 0
    await falls_back(*await start_engine(), session)


async def test_a_session_of_an_earlier_engine_is_computed_here(start_engine: StartEngine) -> None:
    session = await computed(*await start_engine())
    later, later_sink = await start_engine()
    theirs = await computed(later, later_sink)
    await falls_back(*await start_engine(), replace(session, endpoints=theirs.endpoints))
    assert later.load().active_kv_blocks == PROMPT_BLOCKS


@asynccontextmanager
async def peer(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """An endpoint that behaves badly."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await answer(reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


async def stay_silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    pass


async def talk_nonsense(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'{"type":"Grant","blocks":-1,"bytes":0}\n')


async def talk_without_end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x" * 100_000)


async def grant_too_little(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'{"type":"Grant","blocks":1,"bytes":16}\n')


async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize(
    "answer", [stay_silent, talk_nonsense, talk_without_end, grant_too_little, hang_up]
)
async def test_a_peer_that_behaves_badly_is_given_up(
    start_engine: StartEngine,
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    session = await computed(*await start_engine())
    async with peer(answer) as endpoint:
        decode, sink = await start_engine(transfer_timeout_seconds=0.2)
        await falls_back(decode, sink, replace(session, endpoints=(endpoint,)))


async def test_an_endpoint_without_a_port_is_given_up(start_engine: StartEngine) -> None:
    session = await computed(*await start_engine())
    await falls_back(*await start_engine(), replace(session, endpoints=("nowhere",)))


async def test_cancelling_a_request_breaks_its_pull_off(start_engine: StartEngine) -> None:
    session = await computed(*await start_engine())
    is_asked, is_gone = asyncio.Event(), asyncio.Event()

    async def listen(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        is_asked.set()
        await reader.read()
        is_gone.set()

    async with peer(listen) as endpoint:
        decode, sink = await start_engine(transfer_timeout_seconds=60.0)
        stuck = replace(session, endpoints=(endpoint,))
        decode.submit([whole(5, leg=Leg.DECODE, kv_session=stuck)])
        async with asyncio.timeout(20):
            await is_asked.wait()
            assert decode.load().waiting_requests == 1
            decode.cancel([RequestKey(5)])
            assert decode.load().active_kv_blocks == 0
            await is_gone.wait()
    decode.submit([whole(6)])
    await sink.until(lambda: sink.outcome.finishes)
    assert set(sink.outcome.starts) == {6}
    assert decode.counters().transfer_failures == 0


async def test_a_prompt_waits_for_kept_blocks_to_expire(start_engine: StartEngine) -> None:
    prefill, sink = await start_engine(kv_cache_tokens=112, kv_lease_seconds=0.05)
    other = request(2, range(200, 300), leg=Leg.PREFILL, block_size_tokens=BLOCK_SIZE_TOKENS)
    prefill.submit([whole(1, leg=Leg.PREFILL), other])
    await sink.until(lambda: len(sink.outcome.prefilled) == 2)


async def test_a_slow_transfer_is_given_up_and_the_blocks_stay_with_the_peer(
    start_engine: StartEngine,
) -> None:
    prefill, prefill_sink = await start_engine()
    session = await computed(prefill, prefill_sink)
    decode, sink = await start_engine(transfer_bytes_per_second=1.0, transfer_timeout_seconds=0.2)
    await falls_back(decode, sink, session)
    assert prefill.load().active_kv_blocks == PROMPT_BLOCKS


@pytest.mark.parametrize(
    ("changes", "missing_blocks", "reason"),
    [
        ({"last_sequence_hash": 5}, PROMPT_BLOCKS, "another prompt"),
        ({"session_id": "nobody-1"}, PROMPT_BLOCKS, "unknown"),
        ({}, PROMPT_BLOCKS + 1, "asked for 8 of 7 blocks"),
    ],
)
async def test_an_engine_refuses_what_it_does_not_keep(
    start_engine: StartEngine, changes: dict[str, Any], missing_blocks: int, reason: str
) -> None:
    prefill, sink = await start_engine()
    session = replace(await computed(prefill, sink), **changes)
    with pytest.raises(TransferFailed, match=reason):
        await transfer.pull(
            Pull(RequestKey(1), session, missing_blocks), bytes_per_second=1e12, timeout_seconds=20
        )
    assert prefill.load().active_kv_blocks == PROMPT_BLOCKS


async def test_an_engine_survives_nonsense_on_its_transfer_port(start_engine: StartEngine) -> None:
    prefill, prefill_sink = await start_engine()
    session = await computed(prefill, prefill_sink)
    host, _, port = session.endpoints[0].rpartition(":")
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b"\xff\n"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(nonsense)
        writer.write_eof()
        async with asyncio.timeout(20):
            with suppress(ConnectionResetError):
                await reader.read()
        writer.close()
    decode, sink = await start_engine()
    decode.submit([whole(5, leg=Leg.DECODE, kv_session=session)])
    await sink.until(lambda: sink.outcome.finishes)
    assert sink.outcome.starts[5].transferred_tokens == 99


async def test_the_endpoint_is_closed_with_the_engine(start_engine: StartEngine) -> None:
    prefill, sink = await start_engine()
    session = await computed(prefill, sink)
    await prefill.close()
    host, _, port = session.endpoints[0].rpartition(":")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port)), 5):
        pass
