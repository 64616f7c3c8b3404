"""Decisions on real requests: what is known at this moment goes in, and a record is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from itertools import compress
from random import Random
from typing import NamedTuple

from libs.common.errors import ModelNotFound, NoLiveInstance, SwitchgearError
from services.router.core.decision import Overlaps, Prompt, Request, decide
from services.router.core.decision_log import DecisionLog, Record
from services.router.core.known_overlap import KnownOverlap
from services.router.core.sessions import Sessions
from services.router.core.workers import InstanceId, Role, Worker
from services.router.fleet import Fleet
from services.router.live_settings import LiveSettings
from services.router.overlap_client import OverlapClient, query_of
from services.router.routing_options import Wishes, wishes_of
from services.router.waiting_room import WaitingRoom
from switchgear.router.v1 import router_pb2


class Found(NamedTuple):
    """Who holds how much of a prompt, as KV events tell."""

    overlaps: Overlaps
    are_known: bool
    """False when no KV indexer answered."""


class Decider:
    """Shared by all relays of the router."""

    def __init__(
        self,
        fleet: Fleet,
        overlaps: OverlapClient,
        settings: LiveSettings,
        decision_log: DecisionLog,
        random: Random,
    ) -> None:
        self.fleet = fleet
        self._overlaps = overlaps
        self._settings = settings
        self._log = decision_log
        self._random = random
        self._loop = asyncio.get_running_loop()
        self.waiting_room = WaitingRoom(fleet)
        self._known = KnownOverlap()
        self._sessions = Sessions(ttl_seconds=settings.start.session_ttl_seconds)

    async def find_overlaps(
        self, routings: Sequence[router_pb2.RoutingRequest], traceparents: Sequence[str]
    ) -> list[Found]:
        """What KV events tell of each prompt, in order. `traceparents`: of the asking, for each;
        empty for those that are not traced."""
        fleet = self.fleet
        can_tell = [bool(r.sequence_hashes) and fleet.has_events(r.model) for r in routings]
        queries = map(query_of, compress(routings, can_tell), compress(traceparents, can_tell))
        answers = iter(await self._overlaps.find(list(queries)))
        found = []
        for can_be_told in can_tell:
            told = next(answers) if can_be_told else {}
            found.append(Found(told or {}, told is not None))
        return found

    def _overlaps_now(self, routing: router_pb2.RoutingRequest, told: Overlaps) -> Overlaps:
        """With what is estimated and what is on its way: as of this moment, so that a request sees
        those that were sent while it waited for the index, or that came in the same message."""
        if not routing.sequence_hashes:
            return told
        estimated = [worker for worker in self.fleet.estimated if worker.model == routing.model]
        return self._known.overlaps(routing.sequence_hashes, told, estimated, self._loop.time())

    def wishes(self, routing: router_pb2.RoutingRequest) -> Wishes:
        """The policy for a request, and what it asks for itself.

        Raises InvalidRequest and NoLiveInstance for what can't be had.
        """
        return wishes_of(routing, self.fleet, self._settings.policy(routing.model))

    def decide(
        self,
        routing: router_pb2.RoutingRequest,
        found: Found,
        wishes: Wishes,
        *,
        excluded: Collection[InstanceId] = (),
        prompt: Prompt = Prompt.OPEN,
        transfer_backend: str = "",
    ) -> Record | None:
        """Who runs the request; None when nobody can. Not kept. `transfer_backend`: that its KV can
        be pulled with, once a prefill worker has computed the prompt."""
        if prompt is Prompt.OPEN and routing.keeps_prompt_local:
            prompt = Prompt.LOCAL
        session_worker = self._session_worker(routing)
        decision = decide(
            Request(
                model=routing.model,
                prompt_tokens=routing.prompt_tokens,
                block_size_tokens=routing.block_size_tokens,
                excluded=wishes.excluded.union(excluded) if excluded else wishes.excluded,
                pinned=wishes.pinned,
                prompt=prompt,
                transfer_backend=transfer_backend,
                session_worker=session_worker,
            ),
            self.fleet.workers,
            self._overlaps_now(routing, found.overlaps),
            wishes.policy,
            self._random,
        )
        if decision is None:
            return None
        return Record(
            request_id=routing.request_id,
            model=routing.model,
            decided_at=time.time(),
            prompt_tokens=routing.prompt_tokens,
            block_size_tokens=routing.block_size_tokens,
            decision=decision,
            policy=wishes.policy,
            are_overlaps_known=found.are_known,
            session_worker=session_worker,
            lora_name=routing.lora_name,
        )

    def _session_worker(self, routing: router_pb2.RoutingRequest) -> InstanceId | None:
        if not routing.HasField("options"):
            return None
        session_id = routing.options.session_id
        return self._sessions.worker(routing.model, session_id, self._loop.time())

    def keep(self, record: Record) -> None:
        """Remembers a decision that is carried out."""
        self._log.add(record)

    def sent(self, worker: Worker, routing: router_pb2.RoutingRequest) -> None:
        """The worker gets the request's prompt, to compute or to pull."""
        if worker.block_size_tokens == routing.block_size_tokens:
            self._known.sent(worker, routing.sequence_hashes)
        if worker.role is Role.DECODE and routing.HasField("options"):
            self._sessions.served(
                routing.model,
                routing.options.session_id,
                worker.instance_id,
                self._loop.time(),
            )

    def ended(
        self, worker: Worker, routing: router_pb2.RoutingRequest, *, is_computed: bool
    ) -> None:
        """What was sent is over, one way or another. `is_computed`: the worker had its KV."""
        if worker.block_size_tokens == routing.block_size_tokens:
            self._known.ended(
                worker, routing.sequence_hashes, self._loop.time(), is_computed=is_computed
            )

    def nobody(self, model: str, wishes: Wishes) -> SwitchgearError:
        """Why a request can't be served now: its model is unknown, or known and not ready."""
        if not self.fleet.is_known(model):
            return ModelNotFound(f"model {model!r} does not exist", param="model")
        problem = f"no decode worker of model {model!r} is ready"
        if wishes.pinned or wishes.excluded:
            problem += ", or none that the request's routing options leave"
        return NoLiveInstance(problem, retry_after_seconds=1)
