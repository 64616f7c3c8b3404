from typing import Any

import msgspec
import pytest

from libs.common.kv_events import Tier
from libs.engine.interface import (
    EngineBlocksRemoved,
    EngineBlocksStored,
    EngineCacheCleared,
    EngineHash,
)
from libs.engine.vllm_engine.kv_events import MAX_LATE_SALTS, KvEventDecoder


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def stored(hashes: list[Any], parent: Any, **others: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": [1, 2, 3, 4] * len(hashes),
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **others,
    }


def engine_hash(number: int) -> EngineHash:
    return EngineHash(number.to_bytes(8, "big"))


def test_events_keep_their_order_and_their_links() -> None:
    events = KvEventDecoder().decode(
        batch(
            stored([1, 2], None),
            stored([2**64 - 1], 2),
            {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        )
    )
    assert events == [
        EngineBlocksStored((engine_hash(1), engine_hash(2)), None, [1, 2, 3, 4, 1, 2, 3, 4]),
        EngineBlocksStored((engine_hash(2**64 - 1),), engine_hash(2), [1, 2, 3, 4]),
        EngineBlocksRemoved((engine_hash(1),)),
        EngineCacheCleared(),
    ]


def test_hashes_may_come_as_bytes() -> None:
    (event,) = KvEventDecoder().decode(batch(stored([b"ab"], b"cd")))
    assert isinstance(event, EngineBlocksStored)
    assert (event.engine_hashes, event.parent) == ((b"ab",), b"cd")


def test_later_blocks_of_a_salted_prompt_have_the_salt_of_the_first() -> None:
    decoder = KvEventDecoder()
    decoder.decode(batch(stored([1, 2], None, extra_keys=[["tenant"], None])))
    (follower,) = decoder.decode(batch(stored([3], 2, extra_keys=[None])))
    assert isinstance(follower, EngineBlocksStored)
    assert follower.cache_salt == "tenant"


def test_a_salt_is_forgotten_with_its_block() -> None:
    decoder = KvEventDecoder()
    decoder.decode(batch(stored([1], None, extra_keys=[["tenant"]])))
    decoder.decode(batch({"type": "BlockRemoved", "block_hashes": [1]}))
    (follower,) = decoder.decode(batch(stored([2], 1)))
    assert isinstance(follower, EngineBlocksStored)
    assert follower.cache_salt == ""


def test_the_adapters_name_is_not_taken_for_a_salt() -> None:
    keys = [["adapter", ["image", 0], "tenant", b"embeds"]]
    (event,) = KvEventDecoder().decode(
        batch(stored([1], None, lora_name="adapter", extra_keys=keys))
    )
    assert isinstance(event, EngineBlocksStored)
    assert (event.lora_name, event.cache_salt) == ("adapter", "tenant")


def test_an_adapter_without_a_salt_has_none() -> None:
    (event,) = KvEventDecoder().decode(
        batch(stored([1], None, lora_name="adapter", extra_keys=[["adapter"]]))
    )
    assert isinstance(event, EngineBlocksStored)
    assert event.cache_salt == ""


def test_only_the_first_group_of_blocks_counts() -> None:
    events = KvEventDecoder().decode(
        batch(
            stored([1], None, group_idx=0),
            stored([2], None, group_idx=1),
            {"type": "BlockRemoved", "block_hashes": [2], "group_idx": 1},
        )
    )
    assert [type(event) for event in events] == [EngineBlocksStored]


def test_another_format_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        KvEventDecoder().decode(batch({"type": "BlockMoved"}))


def test_each_medium_is_a_tier() -> None:
    events = KvEventDecoder().decode(
        batch(
            stored([1], None),
            stored([1], None, medium="CPU"),
            {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"},
            {"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU"},
            stored([1], None, medium="STORAGE"),
            stored([1], None, medium="TAPE"),
        )
    )
    assert [event.tier for event in events if not isinstance(event, EngineCacheCleared)] == [
        Tier.DEVICE,
        Tier.HOST,
        Tier.DEVICE,
        Tier.HOST,
        Tier.DISK,
    ]


def test_a_copy_in_host_memory_has_its_blocks_salt_even_when_the_gpu_has_dropped_it() -> None:
    decoder = KvEventDecoder()
    decoder.decode(batch(stored([1, 2], None, extra_keys=[["tenant"], None])))
    decoder.decode(batch({"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"}))
    copies = decoder.decode(batch(stored([1], None, medium="CPU"), stored([2], 1, medium="CPU")))
    assert [copy.cache_salt for copy in copies if isinstance(copy, EngineBlocksStored)] == [
        "tenant",
        "tenant",
    ]


def test_salts_of_blocks_that_the_gpu_dropped_are_not_kept_for_ever() -> None:
    decoder = KvEventDecoder()
    hashes = list(range(1, MAX_LATE_SALTS + 2))
    decoder.decode(batch(stored(hashes, None, extra_keys=[["tenant"], *[None] * MAX_LATE_SALTS])))
    decoder.decode(batch({"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}))
    copies = decoder.decode(batch(stored([1], None, medium="CPU"), stored([2], 1, medium="CPU")))
    assert [copy.cache_salt for copy in copies if isinstance(copy, EngineBlocksStored)] == [
        "",
        "tenant",
    ]
