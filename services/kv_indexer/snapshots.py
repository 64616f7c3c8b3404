"""Asks workers for snapshots of their KV caches."""

from __future__ import annotations

from dataclasses import dataclass

from libs.common.channels import Channels
from libs.common.errors import WorkerLost
from libs.common.identity import WORKER
from libs.common.kv_events import (
    BlocksStored,
    ChainStart,
    InstanceId,
    KvSnapshot,
    SequenceHash,
    Tier,
)
from libs.common.kv_messages import chains_of
from services.kv_indexer.events import TIERS
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
    name: str = ""
    """For people."""

    @property
    def log_fields(self) -> dict[str, str]:
        """What names it in a log line."""
        return {
            "worker": self.name,
            "address": self.address,
            "instance": f"{self.instance:016x}",
        }


class _Held:
    """The blocks of one tier, put together from pieces."""

    def __init__(self) -> None:
        self.hashes: list[SequenceHash] = []
        self.chains: list[ChainStart] = []

    def add(self, piece: kv_events_pb2.BlocksStored) -> None:
        starts = chains_of(piece) or ((0, None),)
        self.chains += [(len(self.hashes) + start, before) for start, before in starts]
        self.hashes += piece.sequence_hashes


async def fetch_snapshot(
    worker: Worker, timeout_seconds: float, channels: Channels | None = None
) -> KvSnapshot:
    """What a worker holds now.

    Raises SwitchgearError when it can't be had in time, or when the address turns out to belong to
    somebody else.
    """
    epoch = sequence_number = 0
    is_empty = True
    held = {tier: _Held() for tier in Tier}
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
            if (tier := TIERS.get(piece.blocks.tier)) is not None:
                held[tier].add(piece.blocks)
    if is_empty:
        raise WorkerLost(f"{worker.address} ended a snapshot before its first message")
    device = held.pop(Tier.DEVICE)
    lower = [
        BlocksStored(each.hashes, each.chains, tier) for tier, each in held.items() if each.hashes
    ]
    return KvSnapshot(epoch, sequence_number, device.hashes, device.chains, lower)
