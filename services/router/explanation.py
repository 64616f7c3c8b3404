"""Recorded decisions in the words of the contract. Runs only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from libs.common.grpc_errors import duration_of
from services.router.core.decision import Candidate, Handover, Pick
from services.router.core.decision_log import Record
from services.router.core.hold import Hold, HoldEnd
from services.router.core.policies import Weights
from services.router.core.workers import InstanceId, Worker
from switchgear.router.v1 import router_pb2

_HANDOVERS = {
    Handover.REMOTE: router_pb2.HANDOVER_REMOTE,
    Handover.NO_PREFILL_WORKER: router_pb2.HANDOVER_NO_PREFILL_WORKER,
    Handover.SHORT: router_pb2.HANDOVER_SHORT,
    Handover.HELD: router_pb2.HANDOVER_HELD,
    Handover.LOCAL: router_pb2.HANDOVER_LOCAL,
    Handover.COMPUTED: router_pb2.HANDOVER_COMPUTED,
}
_SAID = router_pb2.Candidate.DESCRIPTOR.fields_by_name
_TERMS = [name for name in Candidate._fields if name in _SAID and name != "worker"]
_WEIGHTS = [field.name for field in fields(Weights)]
"""Terms and weights have the same names here and there."""
_PICKS = {
    Pick.LOWEST: router_pb2.PICK_LOWEST,
    Pick.TIE: router_pb2.PICK_TIE,
    Pick.DRAWN: router_pb2.PICK_DRAWN,
    Pick.PINNED: router_pb2.PICK_PINNED,
    Pick.ROOM: router_pb2.PICK_ROOM,
}
_OUTCOMES = {
    None: router_pb2.HOLD_OUTCOME_LASTS,
    HoldEnd.SENT: router_pb2.HOLD_OUTCOME_SENT,
    HoldEnd.EXPIRED: router_pb2.HOLD_OUTCOME_EXPIRED,
    HoldEnd.CANCELLED: router_pb2.HOLD_OUTCOME_CANCELLED,
    HoldEnd.FAILED: router_pb2.HOLD_OUTCOME_FAILED,
}


def explanation_of(record: Record, now: float) -> router_pb2.Explanation:
    """All that is known of a decision. `now` is of the clock of its holds."""
    decision, policy = record.decision, record.policy
    message = router_pb2.Explanation(
        request_id=record.request_id,
        model=record.model,
        prompt_tokens=record.prompt_tokens,
        block_size_tokens=record.block_size_tokens,
        are_overlaps_known=record.are_overlaps_known,
        handover=_HANDOVERS[decision.handover],
        min_remote_prefill_tokens=policy.min_remote_prefill_tokens,
        max_local_overlap=policy.max_local_overlap,
        decode=_leg(
            record,
            decision.decode,
            decision.decode_candidates,
            decision.decode_pick,
            policy.decode_policy,
        ),
    )
    message.decided_at.FromNanoseconds(int(record.decided_at * 1e9))
    message.holds.extend(_hold(hold, now) for hold in record.holds)
    if decision.handover is not Handover.COMPUTED:
        message.uncached_tokens = decision.whole.new_prefill_tokens
        held_tokens = record.predicted_cached_tokens(decision.whole)
        message.local_overlap = held_tokens / record.prompt_tokens
    if record.decode_cached_tokens is not None:
        message.decode.reported_cached_tokens = record.decode_cached_tokens
    if record.transferred_tokens is not None:
        message.decode.transferred_tokens = record.transferred_tokens
    if decision.prefill is not None and decision.prefill_pick is not None:
        message.prefill.CopyFrom(
            _leg(
                record,
                decision.prefill,
                decision.prefill_candidates,
                decision.prefill_pick,
                policy.prefill_policy,
            )
        )
        if record.prefill_cached_tokens is not None:
            message.prefill.reported_cached_tokens = record.prefill_cached_tokens
        message.whole.CopyFrom(
            _leg(
                record,
                decision.whole,
                decision.whole_candidates,
                decision.whole_pick,
                policy.decode_policy,
            )
        )
    return message


def worker_ref(worker: Worker) -> router_pb2.WorkerRef:
    """A worker, for people and for exclusion."""
    return router_pb2.WorkerRef(instance_id=worker.instance_id, name=worker.name)


def _hold(hold: Hold, now: float) -> router_pb2.Hold:
    return router_pb2.Hold(
        duration=duration_of(hold.seconds(now)),
        outcome=_OUTCOMES[hold.end],
        nearest_worker=worker_ref(hold.nearest),
        lacking_tokens=hold.lacking_tokens,
        is_prompt_computed=hold.is_prompt_computed,
    )


def _leg(
    record: Record, winner: Candidate, candidates: Sequence[Candidate], pick: Pick, policy: str
) -> router_pb2.LegExplanation:
    return router_pb2.LegExplanation(
        worker=worker_ref(winner.worker),
        policy=policy,
        pick=_PICKS[pick],
        temperature=record.policy.temperature,
        candidates=[_candidate(candidate, record.session_worker) for candidate in candidates],
        predicted_cached_tokens=record.predicted_cached_tokens(winner),
        weights=router_pb2.Weights(**{name: getattr(record.policy, name) for name in _WEIGHTS}),
    )


def _candidate(candidate: Candidate, session_worker: InstanceId | None) -> router_pb2.Candidate:
    return router_pb2.Candidate(
        worker=worker_ref(candidate.worker),
        is_of_session=candidate.worker.instance_id == session_worker,
        **{name: getattr(candidate, name) for name in _TERMS},
    )
