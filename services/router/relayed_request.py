"""One request on its way: the stage it is in, and what is known of it by then."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from libs.common import grpc_errors
from services.router import request_trace
from services.router.core.decision_log import Record
from services.router.core.request_stage import FOLLOWING, Stage
from services.router.core.workers import InstanceId, Worker
from services.router.decider import Found
from services.router.routing_options import Wishes
from services.router.waiting_room import Place
from services.router.worker_link import Handle, WorkerLink
from switchgear.common.v1 import generation_pb2
from switchgear.router.v1 import router_pb2


class ComputedPrompt(NamedTuple):
    """A prompt whose KV waits at a prefill worker to be pulled."""

    worker: Worker
    cached_tokens: int
    """That the worker had of it."""
    kv_session: generation_pb2.KvSessionRef
    expires_at: float
    """End of `kv_session`, in the event loop's seconds."""


class RelayedRequest:
    """A request of one frontend session. Times are the event loop's seconds."""

    __slots__ = (
        "arrived_at",
        "computed",
        "deadline",
        "excluded",
        "found",
        "generation",
        "handle",
        "link",
        "place",
        "record",
        "routing",
        "sent_at",
        "stage",
        "timer",
        "trace",
        "wishes",
    )

    def __init__(self, submit: router_pb2.Submit, now: float) -> None:
        self.handle: Handle = submit.handle
        self.arrived_at = now
        self.routing = submit.routing
        self.generation: bytes = submit.generation
        self.deadline: float | None = None
        if submit.routing.HasField("timeout"):
            self.deadline = now + grpc_errors.seconds_of(submit.routing.timeout)
        self.excluded = set(map(InstanceId, submit.routing.excluded_instance_ids))
        """Workers that have failed it, with those that the frontend knows of."""
        self.trace = request_trace.follow(submit.routing)
        """None when it is not sampled, and once it has ended."""
        self.stage = Stage.ASKING
        self.timer: asyncio.TimerHandle | None = None
        """Ends the stage if nothing else does."""
        self.link: WorkerLink | None = None
        """Where it is, from PREFILLING or SENT on; None between two workers."""
        self.computed: ComputedPrompt | None = None
        """None until a prefill worker has computed its prompt."""
        self.found: Found
        """Set at the end of ASKING, with `wishes`."""
        self.wishes: Wishes
        self.record: Record
        """Of the decision that is carried out; set from HELD, PREFILLING or SENT on."""
        self.place: Place
        """Its place in the waiting room; set in HELD."""
        self.sent_at: float
        """When a prefill worker got its prompt; set in PREFILLING."""

    def enter(self, stage: Stage, timer: asyncio.TimerHandle | None = None) -> None:
        """The stage before is over, and with it its timer."""
        assert stage in FOLLOWING[self.stage], f"from {self.stage} to {stage}"
        if self.timer is not None:
            self.timer.cancel()
        self.stage = stage
        self.timer = timer

    def seconds_left(self, now: float) -> float | None:
        """Until its deadline; None when it has none."""
        return None if self.deadline is None else self.deadline - now
