"""Overlap answers where some blocks are in tiers below the device."""

from __future__ import annotations

from collections.abc import Mapping

from libs.common.kv_events import InstanceId, Tier
from services.kv_indexer.core.index import BlockIndex
from switchgear.kv_indexer.v1 import kv_indexer_pb2


def tiered_overlap(
    index: BlockIndex, query: kv_indexer_pb2.OverlapQuery, device: Mapping[InstanceId, int]
) -> kv_indexer_pb2.Overlap:
    """The answer to a query, given how many leading blocks each worker holds on its device."""
    reach = (query.model, query.block_size_tokens, query.sequence_hashes)
    host = index.overlap(*reach, Tier.HOST)
    disk = index.overlap(*reach, Tier.DISK)
    overlap = kv_indexer_pb2.Overlap(
        instance_ids=disk.keys(), blocks=[device.get(instance, 0) for instance in disk]
    )
    if host != device:
        overlap.host_blocks.extend(host.get(each, 0) - device.get(each, 0) for each in disk)
    if disk != host:
        overlap.disk_blocks.extend(blocks - host.get(each, 0) for each, blocks in disk.items())
    return overlap
