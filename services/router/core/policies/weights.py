"""Prices that policies weigh with, all in tokens of work: what computing one prompt token is."""

from __future__ import annotations

import math
from dataclasses import dataclass

NEVER = math.inf
"""The cost of a candidate that is not to be taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The defaults are explained, and measured, in docs/decisions/2026-11-22-routing-cost.md."""

    prefill_weight: float = 1.0
    """Price of a prompt token to compute, this prompt's or one before it."""
    decode_weight: float = 0.2
    """Price of a token's KV held while decoding: all steps of the worker get slower by it."""
    request_tokens: float = 128.0
    """Price of each request that a worker already has: every one makes its steps longer. Without
    it a few workers that hold a hot prefix would get all its requests while the others idle."""
    stall_weight: float = 0.02
    """Price of a prompt token for each request that stands still while it is computed."""
    overflow_weight: float = 4.0
    """Price of a token's KV beyond what the worker has room for."""
    session_tokens: float = 1024.0
    """What it is worth to keep a session on its worker; a busier one loses it."""
    host_credit: float = 0.75
    """What a block in host memory saves of computing it: it has to be loaded. Measured in
    docs/decisions/2026-11-23-kv-tiers.md."""
    disk_credit: float = 0.25
    """Likewise of one on disk."""
