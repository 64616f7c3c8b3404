"""The spans of a KV indexer: answers to traced requests, and recoveries."""

from __future__ import annotations

from functools import partial

import grpc

from libs.common import tracing
from libs.common.errors import KvBatchesGone
from libs.common.grpc_server import serving
from libs.common.kv_events import KvBatch, KvSnapshot
from libs.common.tasks import background
from libs.common.tracing import Kind
from services.kv_indexer.core.follower import BatchRange
from services.kv_indexer.core.index import FastestIndex
from services.kv_indexer.indexer import Indexer
from services.kv_indexer.servicer import KvIndexerServicer
from services.kv_indexer.snapshots import Worker
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from tests.fixtures.eventually import until
from tests.fixtures.spans import KeptSpans

MODEL, BLOCK_SIZE_TOKENS = "m", 16
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = SAMPLED[:-1] + "0"


async def gone(worker: Worker, wanted: BatchRange) -> list[KvBatch]:
    raise KvBatchesGone("long since")


class Snapshots:
    """Of a worker that has numbered so many batches."""

    def __init__(self) -> None:
        self.numbered = 1

    async def fetch(self, worker: Worker) -> KvSnapshot:
        return KvSnapshot(epoch=1, sequence_number=self.numbered, sequence_hashes=[1, 2])


def indexer_of(snapshots: Snapshots) -> Indexer:
    indexer = Indexer(
        index=FastestIndex(1 << 30),
        fetch_snapshot=snapshots.fetch,
        fetch_batches=gone,
        events_connection=lambda: 1,
        silent_after_seconds=60,
        recoveries_at_once=1,
    )
    indexer.set_workers({1: Worker(1, "", MODEL, BLOCK_SIZE_TOKENS)})
    return indexer


async def test_of_the_prompts_of_a_call_those_that_are_traced_have_a_span() -> None:
    indexer, kept = indexer_of(Snapshots()), KeptSpans()
    indexer.index.store(1, [1, 2])
    servicer = KvIndexerServicer(indexer)
    add = partial(kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server, servicer)
    queries = [
        kv_indexer_pb2.OverlapQuery(
            model=MODEL,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            sequence_hashes=[1, 2, 3],
            traceparent=traceparent,
        )
        for traceparent in ("", SAMPLED, NOT_SAMPLED)
    ]
    with tracing.giving_to(kept):
        async with (
            serving("127.0.0.1", 0, add, []) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
                kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            )
            request = kv_indexer_pb2.FindOverlapRequest(queries=queries)
            answer = await stub.FindOverlap(request, timeout=5)
    assert [list(overlap.blocks) for overlap in answer.overlaps] == [[2]] * 3
    [(span, _, attributes, error)] = kept.ended
    assert (span.name, span.kind, error) == ("find overlap", Kind.SERVER, "")
    assert f"{span.trace_id:032x}-{span.parent_id:016x}" == SAMPLED[3:52]
    assert attributes == {
        "gen_ai.request.model": MODEL,
        "switchgear.sequence_hashes": 3,
        "switchgear.instances_with_overlap": 1,
        "switchgear.queries": 3,
        "switchgear.degraded_reasons": ("discovered",),
    }


async def test_each_recovery_is_a_trace_of_its_own_with_what_was_asked_for() -> None:
    snapshots, kept = Snapshots(), KeptSpans()
    indexer = indexer_of(snapshots)
    with tracing.giving_to(kept):
        async with background(indexer.run()):
            await until(lambda: len(kept.ended) == 2)
            # Number 2 is missing, and the worker has it no longer.
            snapshots.numbered = 3
            event = kv_events_pb2.KvEvent(stored=kv_events_pb2.BlocksStored(sequence_hashes=[2]))
            indexer.take(
                kv_events_pb2.KvEventBatch(
                    instance_id=1,
                    model=MODEL,
                    block_size_tokens=BLOCK_SIZE_TOKENS,
                    epoch=1,
                    sequence_number=3,
                    events=[event],
                )
            )
            await until(lambda: len(kept.ended) == 5)
    assert [(span.name, span.kind, error) for span, _, _, error in kept.ended] == [
        ("take snapshot", Kind.CLIENT, ""),
        ("recover", Kind.INTERNAL, ""),
        ("take batches", Kind.CLIENT, "KV_BATCHES_GONE"),
        ("take snapshot", Kind.CLIENT, ""),
        ("recover", Kind.INTERNAL, ""),
    ]
    first, second = kept.ended[1], kept.ended[4]
    assert [span.parent_id for span, *_ in (first, second)] == [0, 0]
    assert first[0].trace_id != second[0].trace_id
    for part, *_ in kept.ended[2:4]:
        assert (part.trace_id, part.parent_id) == (second[0].trace_id, second[0].span_id)
    assert second[2] == {
        "switchgear.instance_id": f"{1:016x}",
        "switchgear.reason": "gap",
        "switchgear.is_in_step": True,
    }


async def test_without_tracing_a_recovery_makes_no_span() -> None:
    indexer = indexer_of(Snapshots())
    assert tracing.begin_own("recover") is None
    async with background(indexer.run()):
        await until(lambda: not any(status.degraded_reason for status in indexer.statuses()))
