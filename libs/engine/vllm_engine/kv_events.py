"""vLLM's KV events in ours. No I/O in here.

vLLM publishes msgpack: an array (timestamp, events, rank), each event a map tagged by `type`. Its
fields that say nothing new to us are left out below, and skipped by the decoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from libs.common.kv_events import Tier
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineCacheCleared,
    EngineHash,
    EngineKvEvent,
)

_TIERS = {None: Tier.DEVICE, "GPU": Tier.DEVICE, "CPU": Tier.HOST, "STORAGE": Tier.DISK}
"""By vLLM's names of media."""

MAX_LATE_SALTS = 16_384
"""Salts of blocks that the GPU dropped, kept for copies to host memory that are under way."""

_RawHash = int | bytes
"""64 bits of vLLM's hash by default, all of it with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0."""


class _BlockStored(msgspec.Struct, tag="BlockStored", frozen=True):
    block_hashes: list[_RawHash]
    parent_block_hash: _RawHash | None
    token_ids: list[int]
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    medium: str | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved", frozen=True):
    block_hashes: list[_RawHash]
    group_idx: int | None = None
    medium: str | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", frozen=True):
    pass


class _Batch(msgspec.Struct, array_like=True, frozen=True):
    timestamp: float
    events: list[_BlockStored | _BlockRemoved | _AllBlocksCleared]


class KvEventDecoder:
    """Decodes one engine's batches, in their order.

    vLLM names the cache salt only with a prompt's first block on the GPU, so the salts of later
    blocks are those of the blocks before them, and those of copies in host memory what they were on
    the GPU. Unsalted blocks, the usual ones, cost no memory here.
    """

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._salts: dict[EngineHash, str] = {}
        """Of blocks on the GPU."""
        self._late_salts: OrderedDict[EngineHash, str] = OrderedDict()
        """Of blocks that it dropped, longest ago first."""

    def decode(self, payload: bytes) -> list[EngineKvEvent]:
        """The events of one batch. Raises msgspec.DecodeError on what is not vLLM's format."""
        events: list[EngineKvEvent] = []
        for event in self._decoder.decode(payload).events:
            match event:
                case _BlockStored() if not event.group_idx and event.medium in _TIERS:
                    events.append(self._stored(event, _TIERS[event.medium]))
                case _BlockRemoved() if not event.group_idx and event.medium in _TIERS:
                    tier = _TIERS[event.medium]
                    hashes = tuple(map(_engine_hash, event.block_hashes))
                    if tier is Tier.DEVICE and self._salts:
                        self._drop_salts(hashes)
                    events.append(EngineBlocksRemoved(hashes, tier))
                case _AllBlocksCleared():
                    self._salts.clear()
                    self._late_salts.clear()
                    events.append(EngineCacheCleared())
                case _:
                    # Models of several kinds of attention keep a group of blocks for each; the
                    # first group alone says which prefixes are held.
                    pass
        return events

    def _stored(self, event: _BlockStored, tier: Tier) -> EngineBlocksStored:
        hashes = tuple(map(_engine_hash, event.block_hashes))
        parent = event.parent_block_hash
        if tier is not Tier.DEVICE:
            salt = self._salts.get(hashes[0]) or self._late_salts.get(hashes[0], "")
        else:
            salt = _salt(event) if parent is None else self._salts.get(_engine_hash(parent), "")
            if salt:
                self._salts.update(dict.fromkeys(hashes, salt))
        return EngineBlocksStored(
            engine_hashes=hashes,
            parent=None if parent is None else _engine_hash(parent),
            token_ids=event.token_ids,
            lora_name=event.lora_name or "",
            cache_salt=salt,
            tier=tier,
        )

    def _drop_salts(self, hashes: Iterable[EngineHash]) -> None:
        for engine_hash in hashes:
            if (salt := self._salts.pop(engine_hash, None)) is not None:
                self._late_salts[engine_hash] = salt
                self._late_salts.move_to_end(engine_hash)
        while len(self._late_salts) > MAX_LATE_SALTS:
            self._late_salts.popitem(last=False)


def _salt(event: _BlockStored) -> str:
    """The text among the first block's extra keys that is not the adapter's name, which comes
    first. Images come as pairs, embeddings as bytes."""
    keys = list((event.extra_keys or [None])[0] or ())
    if event.lora_name:
        keys = keys[1:]
    return next((key for key in keys if isinstance(key, str)), "")


def _engine_hash(raw: _RawHash) -> EngineHash:
    return EngineHash(raw if isinstance(raw, bytes) else raw.to_bytes(8, "big"))
