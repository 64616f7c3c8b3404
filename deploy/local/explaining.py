"""Routers' explanations of their decisions, as tables."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deploy.local.ask_router import CALL_SECONDS, RouterAt, asking
from switchgear.router.v1 import router_pb2

_WHY_THERE = {
    router_pb2.HANDOVER_REMOTE: "by a prefill worker",
    router_pb2.HANDOVER_NO_PREFILL_WORKER: "by the decode worker: no prefill worker can help it",
    router_pb2.HANDOVER_SHORT: "by the decode worker: few tokens are uncached there",
    router_pb2.HANDOVER_HELD: "by the decode worker: it holds most of it",
    router_pb2.HANDOVER_LOCAL: "by the decode worker: the prefill leg failed or is not wanted",
    router_pb2.HANDOVER_COMPUTED: "already, by a prefill worker",
}
_WHY_WON = {
    router_pb2.PICK_LOWEST: "lowest cost",
    router_pb2.PICK_TIE: "by lot among the lowest",
    router_pb2.PICK_DRAWN: "drawn by temperature",
    router_pb2.PICK_PINNED: "pinned by the request",
    router_pb2.PICK_ROOM: "cheapest with room",
}
_HELD_UNTIL = {
    router_pb2.HOLD_OUTCOME_LASTS: "and it still is",
    router_pb2.HOLD_OUTCOME_SENT: "until there was room",
    router_pb2.HOLD_OUTCOME_EXPIRED: "as long as may be, then sent to wait at a worker",
    router_pb2.HOLD_OUTCOME_CANCELLED: "until it was cancelled",
    router_pb2.HOLD_OUTCOME_FAILED: "until it failed",
}
_TERMS: Mapping[str, Callable[[router_pb2.Candidate], int]] = {
    "blocks held": lambda it: it.overlap_blocks,
    "in host memory": lambda it: it.host_blocks,
    "on disk": lambda it: it.disk_blocks,
    "queued": lambda it: it.queued_prefill_tokens,
    "to compute": lambda it: it.new_prefill_tokens,
    "KV": lambda it: it.decode_tokens,
    "requests": lambda it: it.requests,
    "stalled": lambda it: it.stalled_tokens,
    "overflow": lambda it: it.overflow_tokens,
    "session": lambda it: it.is_of_session,
}
"""Columns of a table, in tokens where they don't say something else."""
_IF_ANY = ("in host memory", "on disk")
"""Columns that are left out when nobody has anything there."""


@dataclass
class Decisions:
    """What all routers remember, each with the router's name."""

    decisions: list[tuple[str, router_pb2.Explanation]] = field(default_factory=list)
    """Newest last."""
    degradations: list[tuple[str, router_pb2.Degradation]] = field(default_factory=list)


def last_decisions(routers: Mapping[str, RouterAt], request_id: str, limit: int) -> Decisions:
    """Asks every router, by address. Raises ClusterError when one does not answer."""
    found = Decisions()
    for name, at in routers.items():
        request = router_pb2.ExplainDecisionRequest(request_id=request_id, limit=limit)
        with asking(name, at) as router:
            response = router.ExplainDecision(request, timeout=CALL_SECONDS)
        found.decisions += ((name, explanation) for explanation in response.explanations)
        found.degradations += ((name, degradation) for degradation in response.degradations)
    found.decisions.sort(key=lambda pair: pair[1].decided_at.ToNanoseconds())
    found.decisions = found.decisions[-limit:]
    return found


def shown(router: str, explanation: router_pb2.Explanation) -> RenderableType:
    """One decision: what it was about, and a table for each leg."""
    said = explanation
    at = datetime.fromtimestamp(said.decided_at.ToNanoseconds() / 1e9).astimezone()
    title = Text.assemble((said.request_id, "bold"), f"  {router}, {at:%H:%M:%S.%f}, {said.model}")
    facts = Table(box=None, show_header=False, padding=(0, 1))
    facts.add_row("prompt", f"{said.prompt_tokens} tokens, blocks of {said.block_size_tokens}")
    if not said.are_overlaps_known:
        facts.add_row("overlaps", "not known: no KV indexer answered")
    facts.add_row("computed", _why_there(said))
    for hold in said.holds:
        facts.add_row("held", _how_held(hold))
    parts: list[RenderableType] = [title, Padding(facts, (0, 0, 0, 1))]
    if said.HasField("whole"):
        parts.append(_leg("as if served whole", said.whole))
    if said.HasField("prefill"):
        parts.append(_leg("prefill", said.prefill))
    parts.append(_leg("decode", said.decode))
    return Group(*parts, Text())


def lack_in_words(said: router_pb2.Degradation) -> str:
    """What routing lacks, and of whom."""
    at = f" at {said.address}" if said.address else ""
    of = f" of {', '.join(said.workers)}" if said.workers else ""
    details = f" ({said.details})" if said.details else ""
    return f"{said.source}{at}: {said.reason}{of}{details}"


def _why_there(said: router_pb2.Explanation) -> str:
    reason = _WHY_THERE.get(said.handover, "?")
    if said.handover in (router_pb2.HANDOVER_LOCAL, router_pb2.HANDOVER_COMPUTED):
        return reason
    return (
        f"{reason} ({said.uncached_tokens} uncached, limit {said.min_remote_prefill_tokens}; "
        f"{said.local_overlap:.0%} held, limit {said.max_local_overlap:.0%})"
    )


def _how_held(hold: router_pb2.Hold) -> str:
    computed = ", its prompt computed" if hold.is_prompt_computed else ""
    seconds = hold.duration.ToNanoseconds() / 1e9
    return (
        f"{seconds:.3f} s for room at a decode worker{computed},"
        f" {_HELD_UNTIL.get(hold.outcome, '?')}; {hold.nearest_worker.name} was nearest to it and"
        f" lacked {hold.lacking_tokens} tokens"
    )


def _leg(name: str, leg: router_pb2.LegExplanation) -> RenderableType:
    facts = [f"{name}: {leg.worker.name}, {_WHY_WON.get(leg.pick, '?')}, policy {leg.policy}"]
    if leg.temperature:
        facts.append(f"temperature {leg.temperature:g}")
    cached = [f"predicted {leg.predicted_cached_tokens}"]
    if leg.HasField("reported_cached_tokens"):
        cached.append(f"reported {leg.reported_cached_tokens}")
    if leg.HasField("transferred_tokens"):
        cached.append(f"pulled {leg.transferred_tokens}")
    table = Table("", box=None, header_style="dim", padding=(0, 1))
    table.add_column("worker", no_wrap=True, overflow="ignore")
    terms = {
        title: term
        for title, term in _TERMS.items()
        if title not in _IF_ANY or any(map(term, leg.candidates))
    }
    for title in (*terms, "cost"):
        table.add_column(title, justify="right")
    for candidate in leg.candidates:
        table.add_row(
            "*" if candidate.worker.instance_id == leg.worker.instance_id else "",
            candidate.worker.name,
            *(str(int(term(candidate))) for term in terms.values()),
            f"{candidate.cost:g}" if math.isfinite(candidate.cost) else "never",
        )
    weights = [f"{field.name} {value:g}" for field, value in leg.weights.ListFields()]
    lines = Text(
        f"  {', '.join(facts)}\n    cached tokens: {', '.join(cached)}\n"
        f"    weights: {', '.join(weights)}"
    )
    return Group(lines, Padding(table, (0, 0, 0, 3)))
