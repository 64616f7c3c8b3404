"""Asks workers for snapshots of their KV caches."""

from __future__ import annotations

from dataclasses import dataclass

from libs.common.channels import Channels
from libs.common.errors import WorkerLost
from libs.common.identity import WORKER
from libs.common.kv_events import ChainStart, InstanceId, KvSnapshot, SequenceHash
from libs.common.kv_messages import chains_of
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc


@dataclass(frozen=True, slots=True)
class Worker:
    """A live worker that publishes KV events."""

    instance: InstanceId
    address: str
    """host:port of its gRPC services."""
    model: str
    block_size_tokens: int


async def fetch_snapshot(
    worker: Worker, timeout_seconds: float, channels: Channels | None = None
) -> KvSnapshot:
    """What a worker holds now.

    Raises SwitchgearError when it can't be had in time, or when the address turns out to belong to
    somebody else.
    """
    epoch = sequence_number = 0
    is_empty = True
    hashes: list[SequenceHash] = []
    chains: list[ChainStart] = []
    async with (channels or Channels()).calling(worker.address, WORKER) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        pieces = stub.GetKvSnapshot(worker_pb2.GetKvSnapshotRequest(), timeout=timeout_seconds)
        async for piece in pieces:
            if (piece.instance_id, piece.model, piece.block_size_tokens) != (
                worker.instance,
                worker.model,
                worker.block_size_tokens,
            ):
                raise WorkerLost(f"{worker.address} is not {worker} but {piece.instance_id:x}")
            is_empty = False
            epoch, sequence_number = piece.epoch, piece.sequence_number
            if piece.blocks.tier == kv_events_pb2.TIER_DEVICE:
                starts = chains_of(piece.blocks) or ((0, None),)
                chains += [(len(hashes) + start, before) for start, before in starts]
                hashes += piece.blocks.sequence_hashes
    if is_empty:
        raise WorkerLost(f"{worker.address} ended a snapshot before its first message")
    return KvSnapshot(epoch, sequence_number, hashes, chains)
