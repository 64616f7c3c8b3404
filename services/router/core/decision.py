"""Which workers run a request. Pure: randomness comes as an argument.

Filters come first (model, role, availability, excluded workers), then the policy's costs, which are
in tokens of work so that a person can check them by hand (policies/by_cost.py has the formula of
the default), then pins. The lowest cost wins, equal costs by lot; with a temperature workers are
drawn with odds by cost.

A decode worker with room for the request's KV goes before cheaper ones without, under the policy
kv. When nobody has room the request had better be held back (held.py) than wait at a worker, where
nothing that fits can overtake it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import NamedTuple

from services.router.core.candidates import Candidate, Candidates, Overlaps
from services.router.core.policies import KV, NEVER, POLICIES, Weights
from services.router.core.workers import InstanceId, Role, Worker

__all__ = [
    "Candidate",
    "Decision",
    "Handover",
    "Overlaps",
    "Pick",
    "Policy",
    "Prompt",
    "Request",
    "decide",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Weights):
    """How a decision is made."""

    prefill_policy: str = KV
    """Chooses prefill workers, by its name in core/policies."""
    decode_policy: str = KV
    temperature: float = 0.0
    """0 takes the cheapest. Above, workers are drawn with odds exp(-cost / (temperature * range)),
    where range is the distance between the cheapest and the dearest."""
    min_remote_prefill_tokens: int = 256
    """Prompts with fewer uncached tokens are computed by the decode worker: handing them over would
    take longer."""
    max_local_overlap: float = 0.8
    """Prompts of which the decode worker holds this fraction are computed there, too."""


class Prompt(Enum):
    """Who computes a request's prompt."""

    OPEN = "open"
    """To be decided."""
    LOCAL = "local"
    """The decode worker: the prefill leg has failed, or there is to be none."""
    COMPUTED = "computed"
    """A prefill worker has, and its KV waits to be pulled."""


class Handover(Enum):
    """Why a prompt is computed where it is."""

    REMOTE = "remote"
    """By a prefill worker."""
    NO_PREFILL_WORKER = "no_prefill_worker"
    """By the decode worker: there is no prefill worker that it can pull from."""
    SHORT = "short"
    """By the decode worker, where few of its tokens are uncached."""
    HELD = "held"
    """By the decode worker, which holds most of it."""
    LOCAL = "local"
    """By the decode worker: the prefill leg failed, or there is to be none."""
    COMPUTED = "computed"
    """It has been computed; this decision is on a decode worker alone."""


class Pick(Enum):
    """Why a candidate won."""

    LOWEST = "lowest"
    TIE = "tie"
    """By lot among several of the lowest cost."""
    DRAWN = "drawn"
    """With odds by cost."""
    PINNED = "pinned"
    """The request named it."""
    ROOM = "room"
    """There were cheaper ones, which had no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a decision depends on."""

    model: str
    prompt_tokens: int
    block_size_tokens: int
    """That the overlaps are counted in; workers of another block size count as holding nothing."""
    excluded: Collection[InstanceId] = ()
    pinned: Mapping[Role, InstanceId] = field(default_factory=dict)
    """Who must run a leg, whatever it costs. With a prefill worker in it the prompt is handed over,
    whatever that costs."""
    prompt: Prompt = Prompt.OPEN
    transfer_backend: str = ""
    """That the KV of a computed prompt can be pulled with."""
    session_worker: InstanceId | None = None
    """Who served its session last."""


class Decision(NamedTuple):
    """Who runs a request, and everyone who was considered, cheapest first."""

    decode: Candidate
    """With a prefill worker, who would get it now: it is decided again when the KV is there."""
    prefill: Candidate | None
    """None when the decode worker computes the prompt."""
    decode_candidates: Candidates
    prefill_candidates: Sequence[Candidate]
    handover: Handover
    whole: Candidate
    """The decode worker that was best for the whole request, which `handover` depends on."""
    whole_candidates: Sequence[Candidate]
    decode_pick: Pick
    whole_pick: Pick
    prefill_pick: Pick | None = None
    has_room: bool = True
    """Whether the decode worker has room for the KV now; nobody has if not. True where that is not
    looked at: with a prefill worker, a pinned decode worker or another policy than kv."""


def decide(
    request: Request, workers: Iterable[Worker], overlaps: Overlaps, policy: Policy, random: Random
) -> Decision | None:
    """Chooses the decode worker, and a prefill worker if handing over the prompt pays.

    None when no decode worker can take the request, or a pinned worker can't.
    """
    model, excluded = request.model, request.excluded
    decoders: list[Worker] = []
    prefillers: list[Worker] = []
    for worker in workers:
        if worker.is_available and worker.model == model and worker.instance_id not in excluded:
            (decoders if worker.role is Role.DECODE else prefillers).append(worker)
    if request.prompt is Prompt.COMPUTED:
        # Somebody else would compute it again, which is for when nobody is left who can pull it.
        backend = request.transfer_backend
        decoders = [w for w in decoders if w.transfer_backend == backend] or decoders
    if not decoders or _lacks_pinned(request, Role.DECODE, decoders):
        return None
    is_local = request.prompt is not Prompt.COMPUTED
    whole = _weighed(request, decoders, overlaps, policy, random, is_prefill_local=is_local)
    drawn = _draw(request, whole, policy, random)
    if drawn is None:
        return None
    local, local_pick = drawn
    givers: list[Worker] = []
    if prefillers:
        takers = [local.worker] if Role.DECODE in request.pinned else decoders
        backends = {worker.transfer_backend for worker in takers} - {""}
        givers = [worker for worker in prefillers if worker.transfer_backend in backends]
    if request.prompt is Prompt.OPEN and _lacks_pinned(request, Role.PREFILL, givers):
        return None
    handover = _handover(request, local, policy, has_prefill_worker=bool(givers))
    if handover is Handover.REMOTE:
        prefills = _weighed(request, givers, overlaps, policy, random, is_prefill_local=True)
        if (drawn := _draw(request, prefills, policy, random)) is None:
            handover = Handover.NO_PREFILL_WORKER
    if handover is not Handover.REMOTE or drawn is None:
        decode, decode_pick, has_room = local, local_pick, True
        if policy.decode_policy == KV and local_pick is not Pick.PINNED:
            decode, decode_pick, has_room = _with_room(local, local_pick, whole)
        return Decision(
            decode,
            None,
            whole,
            (),
            handover,
            local,
            whole,
            decode_pick,
            local_pick,
            has_room=has_room,
        )
    prefill, prefill_pick = drawn
    backend = prefill.worker.transfer_backend
    pullers = [w for w in decoders if w.transfer_backend == backend]
    decodes = _weighed(request, pullers, overlaps, policy, random, is_prefill_local=False)
    drawn = _draw(request, decodes, policy, random)
    assert drawn is not None, "a policy that could decide among all can among some"
    decode, decode_pick = drawn
    return Decision(
        decode,
        prefill,
        decodes,
        prefills,
        handover,
        local,
        whole,
        decode_pick,
        local_pick,
        prefill_pick,
    )


def _handover(
    request: Request, local: Candidate, policy: Policy, *, has_prefill_worker: bool
) -> Handover:
    """Who computes the prompt, given the decode worker that is best for the whole request: it had
    better compute what it does not hold if that is little, rather than wait for somebody else."""
    match request.prompt:
        case Prompt.LOCAL:
            return Handover.LOCAL
        case Prompt.COMPUTED:
            return Handover.COMPUTED
    if not has_prefill_worker:
        return Handover.NO_PREFILL_WORKER
    if Role.PREFILL in request.pinned:
        return Handover.REMOTE
    uncached = local.new_prefill_tokens
    if uncached < policy.min_remote_prefill_tokens:
        return Handover.SHORT
    # In whatever tier: what has to be loaded would come from elsewhere no sooner.
    if local.held_tokens >= policy.max_local_overlap * request.prompt_tokens:
        return Handover.HELD
    return Handover.REMOTE


def _lacks_pinned(request: Request, role: Role, workers: Iterable[Worker]) -> bool:
    pinned = request.pinned.get(role)
    return pinned is not None and all(worker.instance_id != pinned for worker in workers)


def _weighed(
    request: Request,
    workers: Sequence[Worker],
    overlaps: Overlaps,
    policy: Policy,
    random: Random,
    *,
    is_prefill_local: bool,
) -> Candidates:
    """At least one worker, all of one role, with their costs."""
    candidates = Candidates(
        workers,
        overlaps,
        prompt_tokens=request.prompt_tokens,
        block_size_tokens=request.block_size_tokens,
        is_prefill_local=is_prefill_local,
        session_worker=request.session_worker,
        host_credit=policy.host_credit,
        disk_credit=policy.disk_credit,
    )
    name = policy.decode_policy if candidates.is_decoding else policy.prefill_policy
    candidates.costs = POLICIES[name](candidates, policy, random)
    return candidates


def _with_room(
    chosen: Candidate, pick: Pick, candidates: Candidates
) -> tuple[Candidate, Pick, bool]:
    """In place of a chosen worker that has no room the cheapest one that has, and whether there is
    any."""
    if candidates.has_room(candidates.workers.index(chosen.worker)):
        return chosen, pick, True
    roomy = [n for n in range(len(candidates.workers)) if candidates.has_room(n)]
    if not roomy:
        return chosen, pick, False
    return candidates.at(min(roomy, key=candidates.costs.__getitem__)), Pick.ROOM, True


def _draw(
    request: Request, candidates: Candidates, policy: Policy, random: Random
) -> tuple[Candidate, Pick] | None:
    """Who is chosen, and why; None when the policy takes none."""
    pinned = request.pinned.get(candidates.workers[0].role)
    if pinned is not None:
        named = [worker.instance_id == pinned for worker in candidates.workers]
        return candidates.at(named.index(True)), Pick.PINNED
    costs = candidates.costs
    cheapest = min(costs)
    if cheapest == NEVER:
        return None
    if policy.temperature > 0:
        dearest = max(cost for cost in costs if cost < NEVER)
        if dearest > cheapest:
            scale = policy.temperature * (dearest - cheapest)
            odds = [math.exp((cheapest - cost) / scale) for cost in costs]
            return candidates.at(random.choices(range(len(costs)), odds)[0]), Pick.DRAWN
    if costs.count(cheapest) == 1:
        return candidates.at(costs.index(cheapest)), Pick.LOWEST
    ties = [position for position, cost in enumerate(costs) if cost == cheapest]
    return candidates.at(random.choice(ties)), Pick.TIE
