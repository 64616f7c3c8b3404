"""Policies that look at neither load nor caches."""

from __future__ import annotations

from random import Random

from services.router.core.candidates import Candidates
from services.router.core.policies.weights import NEVER, Weights


def round_robin(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """Whoever has waited longest for a request; workers may come and go."""
    return [float(worker.last_turn) for worker in candidates.workers]


def random(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """All alike: the lot decides."""
    return [0.0] * len(candidates.workers)


def direct(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """Nobody: requests must name their workers."""
    return [NEVER] * len(candidates.workers)
