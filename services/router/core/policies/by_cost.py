"""The policy that weighs what is held against how busy a worker is."""

from __future__ import annotations

from random import Random

from services.router.core.candidates import Candidates
from services.router.core.policies.weights import Weights


def kv(candidates: Candidates, weights: Weights, random: Random) -> list[float]:
    """The cost of docs/routing.md:

        prefill_weight  * (queued prompt tokens + prompt tokens not held)
      + decode_weight   * KV tokens held, with this prompt's
      + request_tokens  * requests there
      + stall_weight    * (prompt tokens not held + those of a step of its own) * requests there
      + overflow_weight * KV tokens that there is no room for
      - session_tokens, where the request's session was served last

    A prefill worker is charged the first line, since it holds blocks only for a moment. When it
    computes the prompt, the decode worker is charged all but what depends on the prompt tokens.
    """
    price = weights.prefill_weight
    queued = candidates.queued_tokens
    if candidates.new_tokens is None:
        costs = [price * ahead for ahead in queued]
    else:
        costs = [
            price * (ahead + new) for ahead, new in zip(queued, candidates.new_tokens, strict=True)
        ]
    if candidates.is_decoding:
        held, stalled, each = weights.decode_weight, weights.stall_weight, weights.request_tokens
        costs = [
            cost + held * kv_tokens + each * requests + stalled * stalled_tokens
            for cost, kv_tokens, requests, stalled_tokens in zip(
                costs,
                candidates.decode_tokens,
                candidates.requests,
                candidates.stalled_tokens,
                strict=True,
            )
        ]
        if any(candidates.overflow_tokens):
            costs = [
                cost + weights.overflow_weight * tokens
                for cost, tokens in zip(costs, candidates.overflow_tokens, strict=True)
            ]
    if candidates.session_worker is not None:
        for position, worker in enumerate(candidates.workers):
            if worker.instance_id == candidates.session_worker:
                costs[position] -= weights.session_tokens
    return costs
