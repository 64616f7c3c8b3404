"""Switchgear's index, from messages as they come from NATS."""

from benchmarks.kv_index.cases import Chain
from libs.common.kv_events import BlocksRemoved, BlocksStored
from services.kv_indexer.core.index import BlockIndex, FastestIndex
from services.kv_indexer.events import from_message
from switchgear.kv_events.v1 import kv_events_pb2

MODEL, BLOCK_SIZE_TOKENS = "model", 16


class SwitchgearSide:
    def __init__(self, index_class: type[BlockIndex] = FastestIndex) -> None:
        self._index = index_class(4 << 30)

    def stored_event(self, chain: Chain) -> bytes:
        stored = kv_events_pb2.BlocksStored(
            sequence_hashes=chain.sequence_hashes, tier=kv_events_pb2.TIER_DEVICE
        )
        return _batch(kv_events_pb2.KvEvent(stored=stored))

    def removed_event(self, chain: Chain) -> bytes:
        removed = kv_events_pb2.BlocksRemoved(
            sequence_hashes=chain.sequence_hashes[::-1], tier=kv_events_pb2.TIER_DEVICE
        )
        return _batch(kv_events_pb2.KvEvent(removed=removed))

    def add(self, worker: int) -> None:
        self._index.add(worker, MODEL, BLOCK_SIZE_TOKENS)

    def apply(self, worker: int, event: bytes) -> None:
        batch = from_message(kv_events_pb2.KvEventBatch.FromString(event))
        for change in batch.events:
            match change:
                case BlocksStored():
                    stored = change.sequence_hashes, change.chains, change.tier
                    self._index.store(worker, *stored)
                case BlocksRemoved():
                    self._index.discard(worker, change.sequence_hashes, change.tier)

    def overlap(self, chain: Chain) -> dict[int, int]:
        return self._index.overlap(MODEL, BLOCK_SIZE_TOKENS, chain.sequence_hashes)

    def remove(self, worker: int) -> None:
        self._index.remove(worker)

    def settle(self) -> None:
        """Nothing is done in the background."""


def _batch(event: kv_events_pb2.KvEvent) -> bytes:
    return kv_events_pb2.KvEventBatch(
        instance_id=1, model=MODEL, block_size_tokens=BLOCK_SIZE_TOKENS, events=[event]
    ).SerializeToString()
