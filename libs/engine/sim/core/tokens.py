"""Which token comes next, without a model.

A token is a function of all tokens before it and of the request's seed, wherever the prompt ends:
a request that goes on elsewhere, its output made part of the prompt, goes on with the same tokens.
The state after a full block is the block's sequence hash, so it need not be computed from the
start; within a block it is folded token by token. Engines that share a request therefore share the
block size, as they share the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

_MASK = (1 << 64) - 1
_LOW = (1 << 32) - 1
_RANKS = 24
"""Tokens that differ in probability; the others share the next one."""
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: odd, and spreads well.


def fold(state: int, token: int) -> int:
    """The state after one more token of the same block."""
    return ((state ^ token) * _MULTIPLIER + 1) & _MASK


def _scrambled(state: int) -> int:
    drawn = (state ^ state >> 29) * _MULTIPLIER & _MASK
    return drawn ^ drawn >> 32


def seed_state(seed: int | None) -> int:
    """What a request's seed adds to every draw."""
    return 0 if seed is None else (seed + 1) * _MULTIPLIER & _MASK


def states(tokens: Sequence[int], hashes: Sequence[int], block_size: int) -> Iterator[int]:
    """The state before each token. `hashes` are those of the full blocks."""
    state = 0
    for position, token in enumerate(tokens):
        if position and position % block_size == 0:
            state = hashes[position // block_size - 1]
        yield state
        state = fold(state, token)


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
        self._known = frozenset(self._vocabulary)
        self.eos_token_id = eos_token_id
        self._eos_below = 0 if eos_token_id is None else round(eos_probability * (_LOW + 1))

    def draw(self, state: int) -> int:
        """The token that follows."""
        drawn = _scrambled(state)
        if drawn & _LOW < self._eos_below and self.eos_token_id is not None:
            return self.eos_token_id
        return self._vocabulary[(drawn >> 32) % self._size]

    def draw_other(self, state: int, barred: Collection[int]) -> int:
        """The token that follows when some may not; one of those only if there is no other."""
        token = self.draw(state)
        if token not in barred:
            return token
        allowed = [other for other in self._vocabulary if other not in barred]
        return allowed[state % len(allowed)] if allowed else token

    def draw_biased(self, state: int, bias: Mapping[int, float]) -> int:
        """The token that follows when some are e^bias times as likely as others, whether they are
        in the vocabulary or not."""
        weights = {token: math.exp(value) for token, value in bias.items()}
        others = self._size - sum(token in self._known for token in weights)
        scrambled = (state ^ state >> 31) * _MULTIPLIER & _MASK
        point = scrambled / (_MASK + 1) * (others + sum(weights.values()))
        for token, weight in weights.items():
            if point < weight:
                return token
            point -= weight
        return self.draw_other(state, weights)

    def logprobs(self, state: int, token: int, alternatives: int) -> list[tuple[int, float]]:
        """A made-up distribution: the token that was drawn has probability 1/2, the vocabulary's
        tokens after it 1/4, 1/8 and so on. The token given comes first, then the likeliest."""
        drawn = self.draw(state)
        begin = (_scrambled(state) >> 32) % self._size
        ranks = {drawn: 1}
        for index in range(begin, begin + min(_RANKS, self._size)):
            ranks.setdefault(self._vocabulary[index % self._size], len(ranks) + 1)
        found = [(token, ranks.get(token, len(ranks) + 1))]
        found += list(ranks.items())[:alternatives]
        return [(candidate, -rank * math.log(2)) for candidate, rank in found]
