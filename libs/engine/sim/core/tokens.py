"""Which token comes next, without a model.

A token is a function of all tokens before it and of the request's seed, wherever the prompt ends:
a request that goes on elsewhere, its output made part of the prompt, goes on with the same tokens.
The state after a full block is the block's sequence hash, so it need not be computed from the
start; within a block it is folded token by token. Engines that share a request therefore share the
block size, as they share the model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_MASK = (1 << 64) - 1
_LOW = (1 << 32) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: odd, and spreads well.


def fold(state: int, token: int) -> int:
    """The state after one more token of the same block."""
    return ((state ^ token) * _MULTIPLIER + 1) & _MASK


def seed_state(seed: int | None) -> int:
    """What a request's seed adds to every draw."""
    return 0 if seed is None else (seed + 1) * _MULTIPLIER & _MASK


class TokenSource:
    """Draws tokens from a vocabulary, and now and then the end of the sequence."""

    def __init__(
        self,
        vocabulary: Sequence[int],
        *,
        eos_token_id: int | None = None,
        eos_probability: float = 0.0,
    ) -> None:
        self._vocabulary = tuple(vocabulary)
        self._size = len(self._vocabulary)
        self.eos_token_id = eos_token_id
        self._eos_below = 0 if eos_token_id is None else round(eos_probability * (_LOW + 1))

    def draw(self, state: int) -> int:
        """The token that follows."""
        drawn = (state ^ state >> 29) * _MULTIPLIER & _MASK
        drawn ^= drawn >> 32
        if drawn & _LOW < self._eos_below and self.eos_token_id is not None:
            return self.eos_token_id
        return self._vocabulary[(drawn >> 32) % self._size]

    def draw_other(self, state: int, barred: Collection[int]) -> int:
        """The token that follows when some may not; one of those only if there is no other."""
        token = self.draw(state)
        allowed = [other for other in self._vocabulary if other not in barred]
        return allowed[state % len(allowed)] if token in barred and allowed else token
