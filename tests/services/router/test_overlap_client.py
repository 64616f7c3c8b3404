"""What bad indexers do to routing: nothing, but for overlaps that are not known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from libs.common.discovery import Table
from libs.common.grpc_server import serving
from libs.common.tasks import background
from services.router.core.candidates import TieredOverlap
from services.router.degraded import Degraded
from services.router.overlap_client import OverlapClient
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from tests.services.router.standing import FakeIndexer

QUERY = kv_indexer_pb2.OverlapQuery(model="m", block_size_tokens=16, sequence_hashes=[1])
HOLDER = 7
SERVICE_NAME = kv_indexer_pb2.DESCRIPTOR.services_by_name["KvIndexerService"].full_name


class Indexer(FakeIndexer):
    """Knows one holder, until it gets stuck, as a stopped process does, or babbles."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = {HOLDER: 1}
        self.was_asked = False
        self.is_stuck = False
        self.babble: kv_indexer_pb2.FindOverlapResponse | None = None
        """Its answer to whatever it is asked."""
        self.sessions = 0
        self.answers_a_session = 1_000
        """How many it gives before it ends one."""

    async def FindOverlap(
        self, request: kv_indexer_pb2.FindOverlapRequest, context: object
    ) -> kv_indexer_pb2.FindOverlapResponse:
        self.was_asked = True
        if self.is_stuck:
            await asyncio.Event().wait()
        if self.babble is not None:
            return self.babble
        return await super().FindOverlap(request, context)

    async def Session(
        self,
        request_iterator: AsyncIterator[kv_indexer_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[kv_indexer_pb2.SessionResponse]:
        self.sessions += 1
        answers = 0
        async for answer in super().Session(request_iterator, context):
            yield answer
            answers += 1
            if answers == self.answers_a_session:
                return

    def add_to(self, server: grpc.aio.Server) -> None:
        kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server(self, server)


class OlderIndexer(Indexer):
    """One of the time before sessions."""

    def add_to(self, server: grpc.aio.Server) -> None:
        find_overlap = grpc.unary_unary_rpc_method_handler(
            self.FindOverlap,
            kv_indexer_pb2.FindOverlapRequest.FromString,
            kv_indexer_pb2.FindOverlapResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, {"FindOverlap": find_overlap}),)
        )


AnyIndexer = pytest.mark.parametrize("make", [Indexer, OlderIndexer])


@asynccontextmanager
async def asking(
    *indexers: Indexer, degraded: Degraded | None = None
) -> AsyncIterator[OverlapClient]:
    async with AsyncExitStack() as stack:
        listed: dict[tuple[str, ...], discovery_pb2.Instance] = {}
        for indexer in indexers:
            server = await stack.enter_async_context(
                serving("127.0.0.1", 0, indexer.add_to, [], grace_seconds=0)
            )
            address = f"127.0.0.1:{server.port}"
            listed[(address,)] = discovery_pb2.Instance(
                address=address, name=f"indexer-{len(listed)}"
            )
        table: Table[discovery_pb2.Instance] = Table()
        table.replace(listed)
        client = OverlapClient(
            table,
            timeout_seconds=1,
            degraded=degraded or Degraded(),
            worker_name="worker-{}".format,
        )
        await stack.enter_async_context(background(client.run()))
        yield client


async def test_blocks_in_lower_tiers_are_told_apart() -> None:
    indexer = Indexer()  # type: ignore[abstract]
    overlap = kv_indexer_pb2.Overlap(
        instance_ids=[HOLDER, 8, 9], blocks=[1, 2, 0], host_blocks=[3, 0, 4]
    )
    indexer.babble = kv_indexer_pb2.FindOverlapResponse(overlaps=[overlap])
    async with asking(indexer) as client:
        assert await client.find([QUERY]) == [
            {HOLDER: TieredOverlap(1, 3), 8: 2, 9: TieredOverlap(0, 4)}
        ]


MALFORMED = pytest.mark.parametrize(
    "overlaps",
    [
        [],
        [kv_indexer_pb2.Overlap(instance_ids=[HOLDER, 8], blocks=[1])],
        [kv_indexer_pb2.Overlap(instance_ids=[HOLDER, 8], blocks=[1, 1], host_blocks=[1])],
    ],
    ids=["too few", "ids without blocks", "ids without blocks in host memory"],
)


@AnyIndexer
@MALFORMED
async def test_a_malformed_answer_is_none_and_the_next_question_is_asked(
    overlaps: list[kv_indexer_pb2.Overlap], make: type[Indexer]
) -> None:
    indexer = make()
    async with asking(indexer) as client, asyncio.timeout(10):
        indexer.babble = kv_indexer_pb2.FindOverlapResponse(overlaps=overlaps)
        assert await client.find([QUERY]) == [None]
        indexer.babble = None
        assert await client.find([QUERY]) == [{HOLDER: 1}]


@AnyIndexer
@MALFORMED
async def test_a_malformed_answer_costs_none_since_another_indexer_is_asked(
    overlaps: list[kv_indexer_pb2.Overlap], make: type[Indexer]
) -> None:
    indexers = make(), make()
    async with asking(*indexers) as client, asyncio.timeout(10):
        assert await client.find([QUERY]) == [{HOLDER: 1}]
        (favourite,) = (indexer for indexer in indexers if indexer.was_asked)
        favourite.babble = kv_indexer_pb2.FindOverlapResponse(overlaps=overlaps)
        assert await client.find([QUERY]) == [{HOLDER: 1}]
        assert all(indexer.was_asked for indexer in indexers)


@AnyIndexer
async def test_an_indexer_that_gets_stuck_costs_one_answer(make: type[Indexer]) -> None:
    indexers = make(), make()
    async with asking(*indexers) as client, asyncio.timeout(10):
        assert await client.find([QUERY]) == [{HOLDER: 1}]
        (favourite,) = (indexer for indexer in indexers if indexer.was_asked)
        favourite.is_stuck = True
        assert await client.find([QUERY]) == [None]
        assert await client.find([QUERY]) == [{HOLDER: 1}]
        assert await client.find([QUERY]) == [{HOLDER: 1}]


async def test_without_an_indexer_each_change_is_told_once() -> None:
    indexer, degraded = Indexer(), Degraded()  # type: ignore[abstract]

    def gauge() -> float | None:
        return REGISTRY.get_sample_value("switchgear_router_degraded", {"reason": "no_kv_indexer"})

    async with asking(indexer, degraded=degraded) as client, asyncio.timeout(20):
        with capture_logs() as lines:
            indexer.babble = kv_indexer_pb2.FindOverlapResponse()
            for _ in range(3):
                assert await client.find([QUERY]) == [None]
            assert gauge() == 1
            [lack] = degraded
            assert (lack.reason, lack.source, lack.workers) == ("no_kv_indexer", "indexer-0", ())
            assert "nonsense" in lack.details
            indexer.babble = None
            for _ in range(3):
                assert await client.find([QUERY]) == [{HOLDER: 1}]
            assert gauge() == 0
    begin, over = (line for line in lines if "degraded" in line["event"])
    assert begin["event"] == "routing is degraded"
    assert (begin["source"], begin["address"]) == (lack.source, lack.address)
    assert over["event"] == "routing is degraded no longer"
    assert (over["reason"], over["source"]) == ("no_kv_indexer", "indexer-0")


async def test_it_is_told_that_no_indexer_is_registered() -> None:
    degraded = Degraded()
    async with asking(degraded=degraded) as client, asyncio.timeout(10):
        assert await client.find([QUERY]) == [None]
    [lack] = degraded
    assert (lack.source, lack.address, lack.details) == ("kv_indexer", "", "none is registered")


async def test_each_indexer_that_does_not_answer_is_named_and_why() -> None:
    stuck, silly, degraded = Indexer(), Indexer(), Degraded()  # type: ignore[abstract]
    stuck.is_stuck = True
    silly.babble = kv_indexer_pb2.FindOverlapResponse()
    async with asking(stuck, silly, degraded=degraded) as client, asyncio.timeout(10):
        # Whoever comes first in a question, each has been asked after two.
        with capture_logs() as lines:
            for _ in range(2):
                assert await client.find([QUERY]) == [None]
        assert {lack.source: lack.details for lack in degraded} == {
            "indexer-0": "no answer in 1 s",
            "indexer-1": "nonsense: 0 overlaps for 1 queries",
        }
    told = [line["source"] for line in lines if line["event"] == "routing is degraded"]
    assert sorted(told) == ["indexer-0", "indexer-1"]


async def test_what_an_indexer_says_that_it_lacks_is_told() -> None:
    indexer, degraded = Indexer(), Degraded()  # type: ignore[abstract]
    async with asking(indexer, degraded=degraded) as client, asyncio.timeout(10):
        with capture_logs() as lines:
            for workers in ([HOLDER], [HOLDER], [HOLDER, 8], [8], []):
                indexer.babble = kv_indexer_pb2.FindOverlapResponse(
                    overlaps=[kv_indexer_pb2.Overlap(instance_ids=[HOLDER], blocks=[1])],
                    degraded_reasons=[
                        kv_indexer_pb2.DegradedReason(reason="gap", instance_ids=workers)
                    ]
                    if workers
                    else [],
                )
                assert await client.find([QUERY]) == [{HOLDER: 1}]
                assert [(lack.reason, lack.source, lack.workers) for lack in degraded] == (
                    [("gap", "indexer-0", tuple(f"worker-{number}" for number in workers))]
                    if workers
                    else []
                )
    # One when it begins, one with who else it is about, and one when it is over.
    assert [(line["event"], line.get("workers")) for line in lines] == [
        ("routing is degraded", ("worker-7",)),
        ("routing is degraded", ("worker-7", "worker-8")),
        ("routing is degraded no longer", None),
    ]


async def test_an_indexer_is_asked_again_and_again_in_one_session() -> None:
    indexer = Indexer()  # type: ignore[abstract]
    async with asking(indexer) as client, asyncio.timeout(10):
        for _ in range(5):
            assert await client.find([QUERY, QUERY]) == [{HOLDER: 1}] * 2
    assert indexer.sessions == 1
    assert indexer.queries == 10


async def test_questions_are_answered_although_sessions_end() -> None:
    indexer = Indexer()  # type: ignore[abstract]
    indexer.answers_a_session = 2
    async with asking(indexer) as client, asyncio.timeout(10):
        for _ in range(10):
            assert await client.find([QUERY]) == [{HOLDER: 1}]
    assert indexer.sessions > 1


async def test_an_indexer_that_answers_again_is_asked_in_a_session_again() -> None:
    indexer = Indexer()  # type: ignore[abstract]
    async with asking(indexer) as client, asyncio.timeout(10):
        indexer.is_stuck = True
        assert await client.find([QUERY]) == [None]
        indexer.is_stuck = False
        for _ in range(3):
            assert await client.find([QUERY]) == [{HOLDER: 1}]
    assert indexer.sessions == 2
