"""Hashes of KV blocks, equal to NVIDIA Dynamo's and the Mooncake KV-event RFC's, so that indexes
can be shared.

Local hash of a block: XXH3-64 of its token ids as little-endian u32, seed 1337. Sequence hash:
s0 = l0, s_i = XXH3-64(LE s_{i-1} || LE l_i, seed 1337): it names the block and all before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import islice
from struct import Struct

from xxhash import xxh3_64_intdigest

SEED = 1337
_PAIR = Struct("<QQ")
_U64 = (1 << 64) - 1


def seed_of(*, lora_name: str = "", cache_salt: str = "") -> int:
    """The seed that isolates blocks of an adapter and of a tenant's cache salt.

    For an adapter: (1337 + XXH3-64(name, seed 0)) mod 2^64. A salt adds the hash of its
    NUL-prefixed bytes, so that no adapter name can stand for a salt.
    """
    seed = SEED
    if lora_name:
        seed += xxh3_64_intdigest(lora_name.encode(), 0)
    if cache_salt:
        seed += xxh3_64_intdigest(b"\0" + cache_salt.encode(), 0)
    return seed & _U64


def local_hashes(tokens: Sequence[int], block_size: int, seed: int = SEED) -> list[int]:
    """Hashes of the full blocks of `tokens`, each of its own tokens only."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    data = memoryview(words.tobytes())
    width = block_size * 4
    return [
        xxh3_64_intdigest(data[start : start + width], seed)
        for start in range(0, len(data) - width + 1, width)
    ]


def chain(local: Sequence[int], parent: int | None = None) -> list[int]:
    """Sequence hashes of consecutive blocks that follow the block `parent`, or start a prompt."""
    if not local:
        return []
    pack = _PAIR.pack
    first = local[0] if parent is None else xxh3_64_intdigest(pack(parent, local[0]), SEED)
    hashes = [first]
    for block in islice(local, 1, None):
        hashes.append(xxh3_64_intdigest(pack(hashes[-1], block), SEED))
    return hashes


def sequence_hashes(
    tokens: Sequence[int], block_size: int, *, lora_name: str = "", cache_salt: str = ""
) -> list[int]:
    """Sequence hashes of the prompt's full blocks; the partial tail has none."""
    seed = seed_of(lora_name=lora_name, cache_salt=cache_salt)
    return chain(local_hashes(tokens, block_size, seed))
