"""Policies by name: how the worker of one leg is chosen among those that can serve it. Pure.

A policy gives each candidate a cost: the lowest wins, equal ones are decided by lot, and who costs
NEVER is not taken. Pins, temperature and lots are the same for all, see decision.py. To add one:
write the function, and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from services.router.core.candidates import Candidates
from services.router.core.policies import by_cost, by_load, by_turn
from services.router.core.policies.weights import NEVER, Weights

Costs = Callable[[Candidates, Weights, Random], list[float]]
"""One cost for each of `candidates.workers`, in that order, in tokens of work where that makes
sense."""

KV = "kv"
"""By what a worker holds of the prompt, and how busy it is. The default."""

POLICIES: Mapping[str, Costs] = {
    KV: by_cost.kv,
    "least-load": by_load.least_load,
    "power-of-two": by_load.power_of_two,
    "round-robin": by_turn.round_robin,
    "random": by_turn.random,
    "direct": by_turn.direct,
}
"""Every name that a setting or a request can give."""

__all__ = ["KV", "NEVER", "POLICIES", "Costs", "Weights"]
