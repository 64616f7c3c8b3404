"""Answers as the probe sees them, from a server that says what the test wants."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from benchmarks.serving.probe import ProbeError, ask, probe_in_turn, probe_regularly
from benchmarks.serving.scenarios import Body

HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"

Serve = Callable[..., Awaitable[str]]


def event(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server that answers with these pieces, and returns its URL."""
    async with AsyncExitStack() as servers:

        async def start(*pieces: bytes) -> str:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                writer.close()
                await writer.wait_closed()

            server = await servers.enter_async_context(
                await asyncio.start_server(answer, "127.0.0.1", 0)
            )
            return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"

        yield start


async def test_events_without_text_are_not_the_first_token(serve: Serve) -> None:
    answer = await ask(await serve(HEAD, event(""), event("a"), event("b")), "{}")
    assert answer.text_events == 2
    assert 0 < answer.first_text_seconds <= answer.last_text_seconds <= answer.total_seconds


async def test_an_event_that_arrives_in_pieces_counts_once(serve: Serve) -> None:
    whole = event("a")
    for cut in range(1, len(whole)):
        answer = await ask(await serve(HEAD, whole[:cut], whole[cut:]), "{}")
        assert answer.text_events == 1


async def test_the_usage_is_found_among_the_events(serve: Serve) -> None:
    usage = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'
    answer = await ask(await serve(HEAD, event("a"), usage), "{}")
    assert answer.usage == {"completion_tokens": 1}


async def test_an_answer_without_usage_says_so_when_it_is_asked(serve: Serve) -> None:
    answer = await ask(await serve(HEAD, event("a")), "{}")
    with pytest.raises(ProbeError, match="no usage"):
        _ = answer.usage


@pytest.mark.parametrize(
    "pieces",
    [(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", event("a")), (HEAD,), ()],
    ids=["a refusal", "no text", "nothing"],
)
async def test_anything_but_a_good_answer_is_an_error(
    serve: Serve, pieces: tuple[bytes, ...]
) -> None:
    with pytest.raises(ProbeError):
        await ask(await serve(*pieces), "{}")


async def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ProbeError):
        await ask("http://127.0.0.1:1/", "{}")


async def test_under_load_an_error_is_a_finding(serve: Serve) -> None:
    url = await serve(b"HTTP/1.1 529 Overloaded\r\n\r\n")
    for outcome in await probe_in_turn(url, Body("", ""), duration_seconds=0.001):
        assert isinstance(outcome, ProbeError)


async def test_probing_in_turn_asks_at_least_once(serve: Serve) -> None:
    url = await serve(HEAD, event("a"))
    assert len(await probe_in_turn(url, Body("", ""), duration_seconds=0.001)) >= 1


async def test_no_more_probes_are_under_way_than_allowed() -> None:
    asked = 0
    may_answer = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await may_answer.wait()
        writer.write(HEAD + event("a"))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        probing = asyncio.create_task(
            probe_regularly(
                url, Body("", ""), interval_seconds=0.001, most_at_once=2, duration_seconds=0.05
            )
        )
        asyncio.get_running_loop().call_later(0.1, may_answer.set)
        await probing
    assert asked == 2
