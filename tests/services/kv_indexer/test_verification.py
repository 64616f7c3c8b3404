"""Verifying an index over gRPC, and what the command makes of the answer."""

from __future__ import annotations

import asyncio
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import grpc
import pytest

from deploy.local.ports import FreePorts
from libs.common.discovery import Discovery
from libs.common.errors import KvBatchesGone, NoLiveInstance
from libs.common.grpc_server import serving
from libs.common.kv_events import BlocksStored, KvBatch, KvSnapshot
from services.kv_indexer import verify
from services.kv_indexer.core.follower import BatchRange
from services.kv_indexer.core.index import FastestIndex
from services.kv_indexer.indexer import Indexer
from services.kv_indexer.servicer import SERVICE_NAME, KvIndexerServicer
from services.kv_indexer.snapshots import Worker
from services.kv_indexer.verify import DIFFERENT, EQUAL, NOT_COMPARED, Answer
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from tests.fixtures.servers import ServerProcess

EPOCH, NUMBER = 3, 7


@dataclass
class Workers:
    """Workers that answer from here, and an index that followed each of them to batch NUMBER."""

    snapshots: dict[int, KvSnapshot | None]
    batches: dict[int, KvBatch] = field(default_factory=dict)
    """Those that workers still have, by number."""

    async def fetch_snapshot(self, worker: Worker) -> KvSnapshot:
        if (snapshot := self.snapshots[worker.instance]) is None:
            raise NoLiveInstance("gone fishing")
        return snapshot

    async def fetch_batches(self, worker: Worker, wanted: BatchRange) -> Sequence[KvBatch]:
        numbers = range(wanted.first, wanted.last + 1)
        if wanted.epoch != EPOCH or not set(numbers) <= self.batches.keys():
            raise KvBatchesGone("too late")
        return [self.batches[number] for number in numbers]

    def indexer(self, *, max_bytes: int = 1 << 20, **held: list[int]) -> Indexer:
        """Workers are called w1, w2, ...; what is not named is followed and empty."""
        indexer = Indexer(
            index=FastestIndex(max_bytes),
            fetch_snapshot=self.fetch_snapshot,
            fetch_batches=self.fetch_batches,
            events_connection=lambda: 1,
            silent_after_seconds=60,
            recoveries_at_once=1,
        )
        indexer.set_workers({instance: Worker(instance, "", "m", 2) for instance in self.snapshots})
        for instance in self.snapshots:
            blocks = [held.get(f"w{instance}", [])] + [[]] * (NUMBER - 1)
            for number, of_batch in enumerate(blocks, start=1):
                stored = kv_events_pb2.BlocksStored(
                    sequence_hashes=of_batch, tier=kv_events_pb2.TIER_DEVICE
                )
                indexer.take(
                    kv_events_pb2.KvEventBatch(
                        instance_id=instance,
                        model="m",
                        block_size_tokens=2,
                        epoch=EPOCH,
                        sequence_number=number,
                        events=[kv_events_pb2.KvEvent(stored=stored)],
                    )
                )
        return indexer


async def answer_of(indexer: Indexer, *instances: int) -> Answer:
    servicer = KvIndexerServicer(indexer)
    add = partial(kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server, servicer)
    async with serving("127.0.0.1", 0, add, [SERVICE_NAME]) as server:
        address = f"127.0.0.1:{server.port}"
        if not instances:
            return await verify.ask("indexer-0", address, timeout_seconds=5)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            request = kv_indexer_pb2.VerifyRequest(instance_ids=instances)
            return Answer("indexer-0", (await stub.Verify(request, timeout=5)).comparisons)


def held(*blocks: int, number: int = NUMBER, epoch: int = EPOCH) -> KvSnapshot:
    return KvSnapshot(epoch, number, blocks)


async def test_an_equal_index_is_equal() -> None:
    workers = Workers({1: held(1, 2), 2: held()})
    answer = await answer_of(workers.indexer(w1=[1, 2]))
    assert verify.verdict(answer) == EQUAL
    assert [comparison.equal_blocks for comparison in answer.comparisons] == [2, 0]


async def test_blocks_on_one_side_alone_are_counted_and_named() -> None:
    workers = Workers({1: held(1, 2, 3)})
    answer = await answer_of(workers.indexer(w1=[1, 9]))
    (comparison,) = answer.comparisons
    assert verify.verdict(answer) == DIFFERENT
    assert (comparison.equal_blocks, comparison.only_in_index_blocks) == (1, 1)
    assert comparison.only_at_worker_blocks == 2
    assert list(comparison.only_in_index_examples) == [9]
    assert sorted(comparison.only_at_worker_examples) == [2, 3]


async def test_batches_on_their_way_are_no_difference() -> None:
    workers = Workers(
        {1: held(1, 2, number=NUMBER + 1)}, {NUMBER + 1: KvBatch(EPOCH, 8, [BlocksStored([2])])}
    )
    answer = await answer_of(workers.indexer(w1=[1]))
    assert verify.verdict(answer) == EQUAL
    (comparison,) = answer.comparisons
    assert comparison.worker_sequence_number - comparison.index_sequence_number == 1


async def test_an_index_too_far_behind_to_be_compared_is_not_called_equal() -> None:
    workers = Workers({1: held(1, number=NUMBER + 1), 2: held(epoch=EPOCH + 1), 3: None})
    answer = await answer_of(workers.indexer(w1=[1]))
    assert verify.verdict(answer) == NOT_COMPARED
    behind, restarted, gone = (comparison.failure for comparison in answer.comparisons)
    assert behind == "too late"
    assert restarted == "the index is at batch 7 of epoch 3, the worker at batch 7 of epoch 4"
    assert gone == "gone fishing"


async def test_what_a_full_index_has_no_room_for_is_evicted_and_not_different() -> None:
    workers = Workers({1: held(1, 2, 3)})
    room_for_two = 2 * FastestIndex.block_bytes + FastestIndex.holders_bytes
    answer = await answer_of(workers.indexer(max_bytes=room_for_two, w1=[1, 2, 3]))
    assert verify.verdict(answer) == EQUAL
    assert answer.comparisons[0].evicted_blocks == 1


async def test_only_the_named_workers_are_compared() -> None:
    workers = Workers({1: held(), 2: held()})
    answer = await answer_of(workers.indexer(), 2, 5)
    assert [comparison.instance_id for comparison in answer.comparisons] == [2, 5]
    assert answer.comparisons[1].failure == "the index does not follow it"


async def test_calls_at_the_same_time_take_turns() -> None:
    workers = Workers({1: held()})
    running = most = 0

    async def fetch_snapshot(worker: Worker) -> KvSnapshot:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return held()

    indexer = workers.indexer()
    indexer.fetch_snapshot = fetch_snapshot
    servicer = KvIndexerServicer(indexer)
    add = partial(kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server, servicer)
    async with serving("127.0.0.1", 0, add, [SERVICE_NAME]) as server:
        asked = [verify.ask("", f"127.0.0.1:{server.port}", 5) for _ in range(3)]
        assert [verify.verdict(answer) for answer in await asyncio.gather(*asked)] == [EQUAL] * 3
    assert most == 1


def test_the_table_has_a_line_for_each_worker_and_tier_and_for_an_indexer_that_says_nothing() -> (
    None
):
    comparisons = [
        kv_indexer_pb2.Comparison(
            instance_id=1,
            model="m",
            index_sequence_number=4,
            worker_sequence_number=6,
            equal_blocks=100,
            evicted_blocks=2,
        ),
        kv_indexer_pb2.Comparison(
            instance_id=2,
            model="m",
            equal_blocks=5,
            lower_tiers=[
                kv_indexer_pb2.TierComparison(
                    tier=kv_events_pb2.TIER_HOST,
                    only_in_index_blocks=1,
                    only_in_index_examples=[0xAB],
                )
            ],
        ),
        kv_indexer_pb2.Comparison(instance_id=3, model="m", failure="gone"),
    ]
    answers = [Answer("indexer-0", comparisons), Answer("indexer-1", (), "UNAVAILABLE")]
    lines = [line.split() for line in verify.table(answers, {1: "decode_worker-0"}).splitlines()]
    unnamed, unreachable = "0000000000000002", "0000000000000003"
    example = ["only", "in", "index:", "00000000000000ab"]
    assert lines[1:] == [
        ["indexer-0", "decode_worker-0", "m", "device", "100", "0", "0", "2", "2", "equal"],
        ["indexer-0", unnamed, "m", "device", "5", "0", "0", "0", "0", "equal"],
        ["indexer-0", unnamed, "m", "host", "0", "1", "0", "0", "0", *example],
        ["indexer-0", unreachable, "m", "-", "-", "-", "-", "-", "-", "gone"],
        ["indexer-1", "-", "-", "-", "-", "-", "-", "-", "-", "UNAVAILABLE"],
    ]
    assert [verify.verdict(Answer("", [each])) for each in comparisons] == [
        EQUAL,
        DIFFERENT,
        NOT_COMPARED,
    ]


@contextmanager
def deaf_server() -> Iterator[str]:
    """The host:port of one that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_dead_etcd_ends_the_command_with_one_line_that_names_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = f"http://127.0.0.1:{FreePorts().take()}"

    assert verify.main(["--etcd-url", url]) == NOT_COMPARED

    out, [error] = split_lines(capfd)
    assert out == []
    assert error.startswith(f"etcd at {url} can't be reached")


def test_what_is_waited_for_is_said_before_it_is_given_up(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with deaf_server() as address:
        assert verify.main(["--etcd-url", f"http://{address}"]) == NOT_COMPARED

    _, [waiting, error] = split_lines(capfd)
    assert waiting == f"waiting for etcd at http://{address}"
    assert error.startswith(f"etcd at http://{address} can't be reached")


async def test_an_indexer_that_does_not_answer_is_named_while_it_is_waited_for(
    etcd_server: ServerProcess,
) -> None:
    discovery = Discovery(etcd_server.url, "busy-indexer")
    busy = _BusyServicer(Workers({}).indexer())
    add = partial(kv_indexer_pb2_grpc.add_KvIndexerServiceServicer_to_server, busy)
    async with serving("127.0.0.1", 0, add, [SERVICE_NAME]) as server:
        instance = discovery_pb2.Instance(
            instance_id=1,
            name="kv_indexer-0",
            role=discovery_pb2.ROLE_KV_INDEXER,
            address=f"127.0.0.1:{server.port}",
        )
        await discovery.put("instances/kv_indexer/1", instance)
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.kv_indexer", "verify", "--timeout-seconds", "1.5"),
            *("--etcd-url", etcd_server.url, "--namespace", "busy-indexer"),
            stdout=PIPE,
            stderr=PIPE,
        )
        out, errors = await command.communicate()

    assert command.returncode == NOT_COMPARED
    assert errors.decode() == "waiting for kv_indexer-0\n"
    assert b"DEADLINE_EXCEEDED" in out


class _BusyServicer(KvIndexerServicer):
    """Compares for ever."""

    async def Verify(self, request: object, context: object) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


def split_lines(capfd: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """What was written to stdout and to stderr."""
    captured = capfd.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()
