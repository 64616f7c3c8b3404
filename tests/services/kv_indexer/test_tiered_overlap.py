"""Overlap answers by tier."""

from libs.common.kv_events import Tier
from services.kv_indexer.core.index import BlockIndex, FastestIndex
from services.kv_indexer.tiered_overlap import tiered_overlap
from switchgear.kv_indexer.v1 import kv_indexer_pb2

PROMPT = [1, 2, 3, 4, 5]
QUERY = kv_indexer_pb2.OverlapQuery(model="m", block_size_tokens=16, sequence_hashes=PROMPT)


def index_of(*stored: tuple[int, list[int], Tier]) -> BlockIndex:
    index = FastestIndex(1 << 20)
    for instance in {instance for instance, _, _ in stored}:
        index.add(instance, "m", 16)
    for instance, blocks, tier in stored:
        before = blocks[0] - 1 or None
        index.store(instance, blocks, ((0, before),), tier)
    return index


def answer(index: BlockIndex) -> dict[int, tuple[int, int, int]]:
    device = index.overlap("m", 16, PROMPT)
    found = tiered_overlap(index, QUERY, device)
    none = [0] * len(found.instance_ids)
    columns = (found.blocks, found.host_blocks or none, found.disk_blocks or none)
    return {
        instance: (on_device, in_host, on_disk)
        for instance, on_device, in_host, on_disk in zip(found.instance_ids, *columns, strict=True)
    }


def test_blocks_after_those_on_the_device_are_counted_by_tier() -> None:
    index = index_of(
        (1, [1, 2], Tier.DEVICE),
        (1, [2, 3, 4], Tier.HOST),
        (1, [5], Tier.DISK),
        (2, [1, 2, 3], Tier.DEVICE),
        (3, [1, 2], Tier.HOST),
    )
    assert answer(index) == {1: (2, 2, 1), 2: (3, 0, 0), 3: (0, 2, 0)}


def test_tiers_that_add_nothing_are_not_sent() -> None:
    index = index_of((1, [1, 2], Tier.DEVICE), (1, [1, 2], Tier.HOST))
    found = tiered_overlap(index, QUERY, index.overlap("m", 16, PROMPT))
    assert (list(found.host_blocks), list(found.disk_blocks)) == ([], [])


def test_a_model_has_lower_tiers_from_when_something_is_stored_there() -> None:
    index = index_of((1, [1, 2], Tier.DEVICE))
    assert not index.has_lower_tiers("m", 16)
    assert not index.has_lower_tiers("unknown", 16)
    index.store(1, [1], tier=Tier.HOST)
    assert index.has_lower_tiers("m", 16)
