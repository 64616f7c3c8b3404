"""Asks workers for KV event batches that were missed."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from libs.common.channels import Channels
from libs.common.errors import WorkerLost
from libs.common.identity import WORKER
from libs.common.kv_events import KvBatch
from services.kv_indexer.core.follower import BatchRange
from services.kv_indexer.events import from_message
from services.kv_indexer.snapshots import Worker
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc


async def fetch_batches(
    worker: Worker, wanted: BatchRange, timeout_seconds: float, channels: Channels | None = None
) -> list[KvBatch]:
    """The batches of that range, in order.

    Raises KvBatchesGone when the worker no longer has them all, and another SwitchgearError when
    they can't be had in time or are not the ones asked for.
    """
    request = worker_pb2.GetKvBatchesRequest(
        epoch=wanted.epoch,
        first_sequence_number=wanted.first,
        last_sequence_number=wanted.last,
    )
    batches: list[KvBatch] = []
    async with (channels or Channels()).calling(worker.address, WORKER) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        async for piece in stub.GetKvBatches(request, timeout=timeout_seconds):
            for data in piece.batches:
                batches.append(_read(worker, wanted, wanted.first + len(batches), data))
    if len(batches) != wanted.last - wanted.first + 1:
        raise WorkerLost(f"{worker.address} sent {len(batches)} batches of {wanted}")
    return batches


def _read(worker: Worker, wanted: BatchRange, number: int, data: bytes) -> KvBatch:
    try:
        message = kv_events_pb2.KvEventBatch.FromString(data)
    except DecodeError as error:
        raise WorkerLost(f"{worker.address} sent an unreadable batch") from error
    found = (
        message.instance_id,
        message.model,
        message.block_size_tokens,
        message.epoch,
        message.sequence_number,
    )
    if found != (worker.instance, worker.model, worker.block_size_tokens, wanted.epoch, number):
        raise WorkerLost(f"{worker.address} sent {found} as batch {number} of {worker}")
    return from_message(message)
