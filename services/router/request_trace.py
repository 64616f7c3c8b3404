"""The router's spans of one request that is traced: the route, its decisions, waits and legs."""

from __future__ import annotations

import time

from libs.common import tracing
from libs.common.tracing import Kind, Span, Value
from services.router.core.decision_log import Record
from services.router.core.hold import Hold, HoldEnd
from switchgear.router.v1 import router_pb2
from switchgear.worker.v1 import worker_pb2

_LEGS = {
    worker_pb2.LEG_PREFILL: "prefill leg",
    worker_pb2.LEG_DECODE: "decode leg",
    worker_pb2.LEG_WHOLE: "whole leg",
}


class RequestTrace:
    """One request's. What it waits for, the indexers' answer, room and each leg, is over before the
    next thing begins."""

    __slots__ = ("_call", "_call_facts", "_routing", "_since_ns", "_span")

    def __init__(self, span: Span, routing: router_pb2.RoutingRequest) -> None:
        self._span = span
        self._routing = routing
        self._since_ns = span.began_at_ns
        """When the last thing was over: what comes now has taken the time since."""
        self._call: Span | None = None
        """What it waits for just now."""
        self._call_facts: dict[str, Value] = {}

    def overlaps_asked(self) -> str:
        """Gives the traceparent for the KV indexer."""
        self._call = self._span.child("find overlaps", Kind.CLIENT, began_at_ns=self._since_ns)
        self._call_facts = {"switchgear.sequence_hashes": len(self._routing.sequence_hashes)}
        return self._call.traceparent

    def overlaps_found(self, instances: int, *, are_known: bool) -> None:
        """The KV indexer has answered, for all requests that came together, or it has not."""
        self._call_facts["switchgear.instances_with_overlap"] = instances
        self._call_facts["switchgear.are_overlaps_known"] = are_known
        self._call_ended()

    def decided(self, record: Record | None) -> None:
        """A decision was made, on nobody if None."""
        facts: dict[str, Value] = {}
        if record is not None:
            decision = record.decision
            computing = decision.prefill or decision.decode
            facts["switchgear.handover"] = decision.handover.value
            facts["switchgear.decode_worker"] = decision.decode.worker.name
            if decision.prefill is not None:
                facts["switchgear.prefill_worker"] = decision.prefill.worker.name
            facts["switchgear.has_room"] = decision.has_room
            facts["switchgear.candidates"] = record.candidates
            facts["switchgear.predicted_cached_tokens"] = record.predicted_cached_tokens(computing)
        now_ns = time.time_ns()
        self._span.child("decide", began_at_ns=self._since_ns).end(facts, ended_at_ns=now_ns)
        self._since_ns = now_ns

    def held(self, record: Record, hold: Hold) -> None:
        """A decision was made that nobody has room for: the request waits for it."""
        self.decided(record)
        self._call = self._span.child("held", began_at_ns=self._since_ns)
        self._call_facts = {
            "switchgear.nearest_worker": hold.nearest.name,
            "switchgear.lacking_tokens": hold.lacking_tokens,
        }

    def held_no_longer(self, end: HoldEnd) -> None:
        """It is decided on again, or over. Nothing happens if it was before."""
        if self._call is not None:
            self._call_facts["switchgear.hold_outcome"] = end.value
            self._call_ended()

    def leg_begins(self, leg: worker_pb2.Leg.ValueType, worker: str) -> str:
        """Gives the traceparent for the worker."""
        self._call = self._span.child(_LEGS[leg], Kind.CLIENT)
        self._call_facts = {"switchgear.worker": worker}
        return self._call.traceparent

    def leg_ended(self, error: str = "") -> None:
        """If there is one."""
        self._call_ended(error)

    def _call_ended(self, error: str = "") -> None:
        self._since_ns = time.time_ns()
        if self._call is not None:
            self._call.end(self._call_facts, error=error, ended_at_ns=self._since_ns)
            self._call = None

    def end(self, error: str = "", *, is_cancelled: bool = False) -> None:
        """The request is over, and with it what it waits for. Being cancelled is no error: the
        frontend does so when it finds a stop string, too."""
        self._call_ended(error)
        self._span.end(
            {
                "gen_ai.request.model": self._routing.model,
                "gen_ai.response.id": self._routing.request_id,
                "gen_ai.usage.input_tokens": self._routing.prompt_tokens,
                "switchgear.is_cancelled": is_cancelled,
            },
            error=error,
        )


def follow(routing: router_pb2.RoutingRequest) -> RequestTrace | None:
    """The trace of a request that has just come; None when it is not sampled."""
    span = tracing.follow(routing.traceparent, "route")
    return None if span is None else RequestTrace(span, routing)
