"""Follows the KV events that the engine core publishes over ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import zmq
import zmq.asyncio

from libs.common import logs
from libs.engine.interface import EngineCacheCleared, EngineKvEvent
from libs.engine.vllm_engine.kv_events import KvEventDecoder

log = logs.get(__name__)

TOPIC = "kv"
REPLAY_TIMEOUT_SECONDS = 2.0
QUEUE_BATCHES = 100_000
_END = (-1).to_bytes(8, "big", signed=True)


def endpoints(folder: Path) -> tuple[str, str]:
    """Where to publish and where to replay, as sockets in a private folder."""
    return f"ipc://{folder}/events", f"ipc://{folder}/replay"


async def follow(folder: Path) -> AsyncIterator[list[EngineKvEvent]]:
    """The engine's events, a batch an engine step, from its first on and without a gap.

    A PUB socket drops what a subscriber doesn't take in time, and what was published before it
    was there. Batches are numbered from 0, so that is noticed at the next batch, and the missing
    ones are replayed. When they can't be, the cache is reported as cleared: holding more than is
    known is better than knowing what isn't held.
    """
    publish, replay = endpoints(folder)
    decoder = KvEventDecoder()
    expected = 0
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as events:
        events.linger = 0
        events.rcvhwm = QUEUE_BATCHES
        events.subscribe(TOPIC)
        events.connect(publish)
        while True:
            _, number, payload = await events.recv_multipart()
            sequence = int.from_bytes(number, "big")
            if sequence > expected:
                missing = await _missing(context, replay, expected, sequence)
                log.warning("kv events replayed", first=expected, batches=len(missing))
                if len(missing) < sequence - expected:
                    log.error("kv events lost", first=expected, next=sequence)
                    yield [EngineCacheCleared()]
                for batch in missing:
                    yield decoder.decode(batch)
            if sequence >= expected:
                expected = sequence + 1
                yield decoder.decode(payload)


async def _missing(
    context: zmq.asyncio.Context, endpoint: str, first: int, end: int
) -> list[bytes]:
    """The batches numbered from `first` until before `end`, or the last of them, in order."""
    batches: list[bytes] = []
    with context.socket(zmq.DEALER) as replay:
        replay.linger = 0
        replay.connect(endpoint)
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_SECONDS):
                await replay.send_multipart([b"", first.to_bytes(8, "big")])
                while True:
                    _, _, number, payload = await replay.recv_multipart()
                    if number == _END:
                        break
                    if int.from_bytes(number, "big") < end:
                        batches.append(payload)
        except TimeoutError:
            # An answer cut short has a hole at its end, so nothing of it can be used.
            return []
    return batches
