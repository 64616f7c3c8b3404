"""Asks a KV indexer who holds which prefix: one call for all that wait, any that answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias, cast

import grpc
from prometheus_client import Histogram

from libs.common import logs
from libs.common.channels import Channels
from libs.common.discovery import Discovery, Table
from libs.common.tasks import background
from services.router.core.candidates import Overlaps, TieredOverlap
from services.router.core.workers import InstanceId
from services.router.degraded import NO_KV_INDEXER, Degraded, Lack
from services.router.indexer_link import IndexerLink
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2
from switchgear.router.v1 import router_pb2

log = logs.get(__name__)

QUERY_SECONDS = Histogram(
    "switchgear_router_overlap_query_seconds",
    "From asking KV indexers for the overlaps of some prompts to knowing them, or giving up.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)

MAX_QUERIES_A_CALL = 256

TELLER = "kv_indexer"
"""As which it reports what indexers lack, and who is lacking when there is none."""

_Key: TypeAlias = tuple[str, int]
"""An indexer's address and instance id: one that was started again may be another version."""


class _Failure(NamedTuple):
    """An indexer did not answer, or has not answered yet."""

    at_seconds: float
    """In the event loop's time."""
    problem: str


_NEVER = _Failure(0.0, "not asked in time")
"""Of one that has not failed to answer."""


class OverlapClient:
    """A queue of questions, and one call at a time that takes them all along.

    Without an indexer that answers in time the overlaps are not known, and routing goes by load
    alone: that is never an error to the client.
    """

    def __init__(
        self,
        indexers: Table[discovery_pb2.Instance],
        timeout_seconds: float,
        degraded: Degraded,
        channels: Channels | None = None,
        worker_name: Callable[[InstanceId], str] = "{:016x}".format,
    ) -> None:
        """`worker_name`: of those that indexers speak of."""
        self._indexers = indexers
        self._worker_name = worker_name
        self._opening = channels or Channels()
        self._degraded = degraded
        self._timeout_seconds = timeout_seconds
        self._waiting: list[
            tuple[kv_indexer_pb2.OverlapQuery, asyncio.Future[Overlaps | None]]
        ] = []
        self._news = asyncio.Event()
        self._links: dict[_Key, IndexerLink] = {}
        self._failures: dict[_Key, _Failure] = {}
        """The last one of each indexer that has not answered since."""
        self._no_answer = f"no answer in {timeout_seconds} s"

    async def find(self, queries: Sequence[kv_indexer_pb2.OverlapQuery]) -> list[Overlaps | None]:
        """Overlaps of each prompt, in order; None when they can't be known. Takes no longer than a
        few times the timeout."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Overlaps | None]] = [loop.create_future() for _ in queries]
        self._waiting.extend(zip(queries, futures, strict=True))
        self._news.set()
        return [await future for future in futures]

    async def run(self) -> None:
        """Answers until cancelled."""
        try:
            while True:
                # What comes while a question is on its way is asked with the next one.
                await self._news.wait()
                batch = self._waiting[:MAX_QUERIES_A_CALL]
                del self._waiting[:MAX_QUERIES_A_CALL]
                if not batch:
                    self._news.clear()
                    continue
                with QUERY_SECONDS.time():
                    answers = await self._ask([query for query, _ in batch])
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
        finally:
            for link in self._links.values():
                await link.close()

    async def _ask(
        self, queries: Sequence[kv_indexer_pb2.OverlapQuery]
    ) -> Sequence[Overlaps | None]:
        request = kv_indexer_pb2.FindOverlapRequest(queries=queries)
        listed = {
            (indexer.address, indexer.instance_id): indexer.name
            for indexer in self._indexers.values()
        }
        for gone in self._links.keys() - listed.keys():
            await self._links.pop(gone).close()
        for gone in self._failures.keys() - listed.keys():
            del self._failures[gone]
        loop = asyncio.get_running_loop()
        # One that is stuck takes all the time there is: it comes last next time. The others come in
        # a set's order, which is another one in each router.
        ordered = sorted(set(listed), key=lambda it: self._failures.get(it, _NEVER).at_seconds)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                for indexer in ordered:
                    failure = self._failures[indexer] = _Failure(loop.time(), self._no_answer)
                    address, _ = indexer
                    link = self._links.get(indexer)
                    if link is None:
                        link = self._links[indexer] = IndexerLink(address, self._opening)
                    try:
                        response = await link.ask(request)
                        answers = _overlaps(response, len(queries))
                    except grpc.aio.AioRpcError as error:
                        log.debug("indexer failed", address=address, status=error.code().name)
                        self._failures[indexer] = failure._replace(problem=error.code().name)
                        self._opening.failed(address, "kv_indexer", error)
                        if link.certificate_version != self._opening.version:
                            await self._links.pop(indexer).close()
                    except ValueError as error:
                        log.warning(
                            "indexer answered nonsense",
                            indexer=listed[indexer],
                            address=address,
                            error=str(error),
                        )
                        self._failures[indexer] = failure._replace(problem=f"nonsense: {error}")
                    else:
                        del self._failures[indexer]
                        reasons = response.degraded_reasons
                        lacks = [self._lack(it, listed[indexer], address) for it in reasons]
                        self._degraded.report(TELLER, lacks)
                        return answers
        except TimeoutError:
            log.debug("indexers too slow", timeout_seconds=self._timeout_seconds)
        self._degraded.report(TELLER, self._nobody(listed))
        return [None] * len(queries)

    def _lack(self, it: kv_indexer_pb2.DegradedReason, indexer: str, address: str) -> Lack:
        workers = tuple(self._worker_name(InstanceId(instance)) for instance in it.instance_ids)
        return Lack(it.reason, indexer or address, address, workers)

    def _nobody(self, listed: Mapping[_Key, str]) -> list[Lack]:
        """None of those that there are has answered."""
        if not listed:
            return [Lack(NO_KV_INDEXER, TELLER, details="none is registered")]
        return [
            Lack(
                NO_KV_INDEXER,
                name or indexer[0],
                indexer[0],
                details=self._failures.get(indexer, _NEVER).problem,
            )
            for indexer, name in sorted(listed.items())
        ]


def query_of(routing: router_pb2.RoutingRequest, traceparent: str) -> kv_indexer_pb2.OverlapQuery:
    """What to ask about a request; the traceparent is that of the asking, empty without a trace."""
    return kv_indexer_pb2.OverlapQuery(
        model=routing.model,
        block_size_tokens=routing.block_size_tokens,
        sequence_hashes=routing.sequence_hashes,
        traceparent=traceparent,
    )


def _overlaps(response: kv_indexer_pb2.FindOverlapResponse, queries: int) -> list[Overlaps]:
    """Raises ValueError for an answer that does not fit the question."""
    if len(response.overlaps) != queries:
        raise ValueError(f"{len(response.overlaps)} overlaps for {queries} queries")
    # Slices are lists, read much faster than the fields.
    found = [
        _tiered(overlap)
        if overlap.host_blocks or overlap.disk_blocks
        else dict(zip(overlap.instance_ids[:], overlap.blocks[:], strict=True))
        for overlap in response.overlaps
    ]
    return cast("list[Overlaps]", found)


def _tiered(overlap: kv_indexer_pb2.Overlap) -> Overlaps:
    """Raises ValueError, as above."""
    none = [0] * len(overlap.instance_ids)
    columns = zip(
        overlap.instance_ids,
        overlap.blocks,
        overlap.host_blocks or none,
        overlap.disk_blocks or none,
        strict=True,
    )
    return {
        InstanceId(instance): TieredOverlap(device, host, disk) if host or disk else device
        for instance, device, host, disk in columns
    }


@asynccontextmanager
async def asking_indexers(
    discovery: Discovery,
    timeout_seconds: float,
    degraded: Degraded,
    channels: Channels,
    worker_name: Callable[[InstanceId], str],
) -> AsyncIterator[OverlapClient]:
    """A client of whatever indexers the namespace has, while the body runs."""
    async with discovery.watching("instances/kv_indexer/", discovery_pb2.Instance) as indexers:
        client = OverlapClient(indexers, timeout_seconds, degraded, channels, worker_name)
        async with background(client.run()):
            yield client
