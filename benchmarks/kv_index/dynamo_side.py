"""Dynamo's radix tree, through its Python bindings. Runs in Dynamo's environment."""

import json

from dynamo._core import RadixTree

from benchmarks.kv_index.cases import Chain


class DynamoSide:
    def __init__(self) -> None:
        self._tree = RadixTree()

    def stored_event(self, chain: Chain) -> bytes:
        pairs = zip(chain.sequence_hashes, chain.local_hashes, strict=True)
        blocks = [{"block_hash": sequence, "tokens_hash": local} for sequence, local in pairs]
        return _event({"stored": {"parent_hash": None, "blocks": blocks}})

    def removed_event(self, chain: Chain) -> bytes:
        return _event({"removed": {"block_hashes": chain.sequence_hashes[::-1]}})

    def add(self, worker: int) -> None:
        """Workers are known from their first event."""

    def apply(self, worker: int, event: bytes) -> None:
        self._tree.apply_event(worker, event)

    def overlap(self, chain: Chain) -> dict[int, int]:
        scores = self._tree.find_matches(chain.local_hashes).scores
        return {worker: blocks for (worker, _), blocks in scores.items()}

    def remove(self, worker: int) -> None:
        self._tree.remove_worker(worker)

    def settle(self) -> None:
        # Everything goes through one thread, in order.
        self._tree.find_matches([0])


def _event(data: object) -> bytes:
    return json.dumps({"event_id": 0, "data": data, "dp_rank": 0}).encode()
