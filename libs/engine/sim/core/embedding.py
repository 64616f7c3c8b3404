"""A vector for a prompt, without a model.

Feature hashing (Weinberger et al., 2009): every token adds 1 or -1 at a few places that its hash
names, and the sum is scaled to length 1. Prompts that share tokens are near each other, others
nearly at right angles; which worker embeds one makes no difference.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

_PLACES = 4
"""For each token, 16 bits of its hash for each."""


def embedding(prompt: Sequence[int], dimensions: int) -> bytes:
    """The vector of a prompt, as 32-bit floats, little-endian."""
    sums = [0.0] * dimensions
    for token, count in Counter(prompt).items():
        drawn = xxh3_64_intdigest(token.to_bytes(4, "little"))
        for _ in range(_PLACES):
            sums[(drawn >> 1 & 0x7FFF) % dimensions] += count if drawn & 1 else -count
            drawn >>= 16
    length = math.sqrt(sum(value * value for value in sums))
    if not length:
        # Tokens that cancel one another out, which hardly happens; there must be a direction.
        sums[0] = length = 1.0
    values = array("f", [value / length for value in sums])
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
