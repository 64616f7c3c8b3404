"""Policies that look at load and not at caches."""

from __future__ import annotations

from random import Random

from services.router.core.candidates import Candidates
from services.router.core.policies.weights import NEVER, Weights


def least_load(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """Queued prompt tokens and KV in use, priced as in the policy kv."""
    held = weights.decode_weight if candidates.is_decoding else 0.0
    return [
        weights.prefill_weight * worker.queued_prefill_tokens
        + held * worker.active_kv_blocks * worker.block_size_tokens
        for worker in candidates.workers
    ]


def power_of_two(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """The less loaded one of two that are drawn: nearly as even as least-load, and routers that
    know equally little of each other do not all run to the same worker."""
    count = len(candidates.workers)
    drawn = set(random.sample(range(count), min(2, count)))
    return [
        cost if position in drawn else NEVER
        for position, cost in enumerate(least_load(candidates, weights, random))
    ]
