"""Compares what engines find cached with what routing predicted."""

from __future__ import annotations

from prometheus_client import Counter

from services.router.core.agreement import Agreement, Outcome
from services.router.core.decision import Candidate
from services.router.core.decision_log import Record
from services.router.core.workers import InstanceId, Worker
from services.router.degraded import Degraded, Lack
from services.router.fleet import Fleet

CACHED_TOKENS = Counter(
    "switchgear_router_cached_tokens_total",
    "Prompt tokens that the engines of chosen workers found cached, and what was predicted of them",
    ["by"],
)
_PREDICTED, _REPORTED = CACHED_TOKENS.labels("predicted"), CACHED_TOKENS.labels("reported")


class OverlapCheck:
    """An agreement for each worker."""

    def __init__(self, fleet: Fleet, degraded: Degraded) -> None:
        self._fleet = fleet
        self._degraded = degraded
        self._agreements: dict[InstanceId, Agreement] = {}
        fleet.on_gone(self._forget)
        fleet.on_fit(self._report)
        for worker in fleet.workers:
            self._report(worker)

    def computed(self, record: Record, by: Candidate, reported_tokens: int) -> None:
        """A worker has computed the prompt of a decision, and says what it had cached."""
        worker = by.worker
        has_events = worker.holdings is None
        if has_events and not record.are_overlaps_known:
            return  # Nothing was predicted.
        predicted_tokens = record.predicted_cached_tokens(by)
        if predicted_tokens:
            _PREDICTED.inc(predicted_tokens)
        if reported_tokens:
            _REPORTED.inc(reported_tokens)
        agreement = self._agreements.get(worker.instance_id)
        if agreement is None:
            agreement = self._agreements[worker.instance_id] = Agreement()
        reason_before = agreement.reason
        agreement.add(
            Outcome(
                predicted_tokens=predicted_tokens,
                reported_tokens=reported_tokens,
                block_size_tokens=worker.block_size_tokens,
                is_block_size_right=worker.block_size_tokens == record.block_size_tokens,
                has_adapter=bool(record.lora_name),
                has_events=has_events,
                has_common_files=self._fleet.has_common_files(worker),
            )
        )
        if agreement.reason is not reason_before:
            self._report(worker)

    def _report(self, worker: Worker) -> None:
        """Says what predictions for the worker lack, or will lack since it does not fit its
        model."""
        lacking = {reason.value for reason in self._fleet.lacking(worker.name)}
        agreement = self._agreements.get(worker.instance_id)
        if agreement is not None and agreement.reason is not None:
            lacking.add(agreement.reason.value)
        lacks = [Lack(reason, worker.name) for reason in sorted(lacking)]
        self._degraded.report(worker.name, lacks)

    def _forget(self, worker: Worker) -> None:
        self._agreements.pop(worker.instance_id, None)
        self._report(worker)
