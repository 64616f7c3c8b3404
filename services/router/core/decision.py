"""Which workers run a request. Pure: randomness comes as an argument.

Costs are in tokens of work, so that a person can check them by hand:

    prefill = queued prefill tokens + (prompt tokens - overlap tokens)
    cost    = prefill_weight * prefill
            + decode_weight * (active blocks + new blocks) * block size

A prefill worker is charged the first line, since it holds blocks only for a moment. When it
computes the prompt, the decode worker is charged its queue and its blocks, but not the prompt. The
lowest cost wins, equal costs by lot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from services.router.core.policies import KV
from services.router.core.workers import Booking, InstanceId, Role, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a decision weighs."""

    prefill_policy: str = KV
    """Chooses prefill workers, by its name in core/policies."""
    decode_policy: str = KV
    prefill_weight: float = 1.0
    """Price of a prompt token that has to be computed, in tokens of work."""
    decode_weight: float = 1.0
    """Price of a token's KV held while decoding, in tokens of work."""
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
    """The decode worker: the prefill leg has failed."""
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker's terms, in tokens of work but for the overlap."""

    worker: Worker
    overlap_blocks: int
    queued_prefill_tokens: int
    new_prefill_tokens: int
    new_kv_blocks: int
    decode_tokens: int
    cost: float

    @property
    def booking(self) -> Booking:
        """What choosing it adds to its load."""
        return Booking(self.new_prefill_tokens, self.new_kv_blocks)


@dataclass(frozen=True, slots=True)
class Decision:
    """Who runs a request, and everyone who was considered, cheapest first."""

    decode: Candidate
    prefill: Candidate | None
    """None when the decode worker computes the prompt."""
    decode_candidates: Sequence[Candidate]
    prefill_candidates: Sequence[Candidate]
    handover: Handover
    whole: Candidate
    """The decode worker that was best for the whole request, which `handover` depends on."""
    whole_candidates: Sequence[Candidate]
    decode_pick: Pick
    whole_pick: Pick
    prefill_pick: Pick | None = None


Overlaps = Mapping[InstanceId, int]
"""Leading blocks of the prompt that each worker holds; those that hold none are left out."""


def decide(
    request: Request, workers: Iterable[Worker], overlaps: Overlaps, policy: Policy, random: Random
) -> Decision | None:
    """Chooses the decode worker, and a prefill worker if handing over the prompt pays.

    None when no decode worker can take the request, or a pinned worker can't.
    """
    eligible = [
        worker
        for worker in workers
        if worker.model == request.model
        and worker.is_available
        and worker.instance_id not in request.excluded
    ]
    decoders = _of(Role.DECODE, eligible)
    if not decoders or _lacks_pinned(request, Role.DECODE, decoders):
        return None
    is_local = request.prompt is not Prompt.COMPUTED
    whole = _ranked(request, decoders, overlaps, policy, is_prefill_local=is_local)
    local, local_pick = _draw(request, whole, policy, random)
    takers = [local.worker] if Role.DECODE in request.pinned else decoders
    backends = {worker.transfer_backend for worker in takers} - {""}
    givers = [w for w in _of(Role.PREFILL, eligible) if w.transfer_backend in backends]
    if request.prompt is Prompt.OPEN and _lacks_pinned(request, Role.PREFILL, givers):
        return None
    handover = _handover(request, local, policy, has_prefill_worker=bool(givers))
    if handover is not Handover.REMOTE:
        return Decision(local, None, whole, (), handover, local, whole, local_pick, local_pick)
    prefills = _ranked(request, givers, overlaps, policy, is_prefill_local=True)
    prefill, prefill_pick = _draw(request, prefills, policy, random)
    backend = prefill.worker.transfer_backend
    pullers = [w for w in decoders if w.transfer_backend == backend]
    decodes = _ranked(request, pullers, overlaps, policy, is_prefill_local=False)
    decode, decode_pick = _draw(request, decodes, policy, random)
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
    cached = request.prompt_tokens - uncached
    if cached >= policy.max_local_overlap * request.prompt_tokens:
        return Handover.HELD
    return Handover.REMOTE


def candidate(
    request: Request, worker: Worker, overlaps: Overlaps, policy: Policy, *, is_prefill_local: bool
) -> Candidate:
    """A worker's cost for a request, with its terms."""
    size = worker.block_size_tokens
    overlap = overlaps.get(worker.instance_id, 0) if size == request.block_size_tokens else 0
    queued = worker.queued_prefill_tokens
    # The last token is always computed: its logits give the first output token.
    new = max(1, request.prompt_tokens - overlap * size) if is_prefill_local else 0
    new_blocks = decode_tokens = 0
    if worker.role is Role.DECODE:
        new_blocks = max(0, math.ceil(request.prompt_tokens / size) - overlap)
        decode_tokens = (worker.active_kv_blocks + new_blocks) * size
    cost = policy.prefill_weight * (queued + new) + policy.decode_weight * decode_tokens
    return Candidate(worker, overlap, queued, new, new_blocks, decode_tokens, cost)


def _of(role: Role, workers: Iterable[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.role is role]


def _lacks_pinned(request: Request, role: Role, workers: Iterable[Worker]) -> bool:
    pinned = request.pinned.get(role)
    return pinned is not None and all(worker.instance_id != pinned for worker in workers)


def _ranked(
    request: Request,
    workers: Iterable[Worker],
    overlaps: Overlaps,
    policy: Policy,
    *,
    is_prefill_local: bool,
) -> list[Candidate]:
    return sorted(
        (
            candidate(request, worker, overlaps, policy, is_prefill_local=is_prefill_local)
            for worker in workers
        ),
        key=lambda candidate: candidate.cost,
    )


def _draw(
    request: Request, ranked: Sequence[Candidate], policy: Policy, random: Random
) -> tuple[Candidate, Pick]:
    """One of at least one candidate, cheapest first, and why it is this one."""
    if (pinned := request.pinned.get(ranked[0].worker.role)) is not None:
        return next(c for c in ranked if c.worker.instance_id == pinned), Pick.PINNED
    cheapest = ranked[0].cost
    spread = ranked[-1].cost - cheapest
    if policy.temperature <= 0 or spread <= 0:
        ties = [candidate for candidate in ranked if candidate.cost == cheapest]
        return (ties[0], Pick.LOWEST) if len(ties) == 1 else (random.choice(ties), Pick.TIE)
    weights = [
        math.exp((cheapest - candidate.cost) / (policy.temperature * spread))
        for candidate in ranked
    ]
    return random.choices(ranked, weights)[0], Pick.DRAWN
