"""What one request asks of routing, checked against the workers there are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from libs.common.errors import InvalidRequest, NoLiveInstance
from services.router.config import known_policy
from services.router.core.decision import Policy
from services.router.core.workers import InstanceId, Role, Worker
from services.router.fleet import Fleet
from switchgear.router.v1 import router_pb2

MAX_SESSION_ID_CHARACTERS = 1024
"""Many are remembered, and frontends let no longer ones through."""

_INSTANCE_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Wishes:
    """One request's policy and workers."""

    policy: Policy
    pinned: Mapping[Role, InstanceId] = field(default_factory=dict)
    excluded: frozenset[InstanceId] = frozenset()


def wishes_of(routing: router_pb2.RoutingRequest, fleet: Fleet, policy: Policy) -> Wishes:
    """The policy in force, with what the request asks for itself.

    Raises InvalidRequest for options that make no sense, NoLiveInstance for a pinned worker that is
    not there.
    """
    if not routing.HasField("options"):
        return Wishes(policy)
    options = routing.options
    if options.policy:
        try:
            name = known_policy(options.policy)
        except ValueError as error:
            raise InvalidRequest(str(error), param="policy") from None
        policy = replace(policy, prefill_policy=name, decode_policy=name)
    if options.HasField("temperature"):
        if not 0 <= options.temperature < math.inf:
            raise InvalidRequest(
                f"the routing temperature must be at least 0, got {options.temperature}",
                param="temperature",
            )
        policy = replace(policy, temperature=options.temperature)
    if len(options.session_id) > MAX_SESSION_ID_CHARACTERS:
        raise InvalidRequest(
            f"the session id must have at most {MAX_SESSION_ID_CHARACTERS} characters, "
            f"got {len(options.session_id)}",
            param="session_id",
        )
    workers = [worker for worker in fleet.workers if worker.model == routing.model]
    return Wishes(
        policy,
        _pinned(options.pinned_workers, workers),
        frozenset(
            w.instance_id for name in options.excluded_workers for w in _named(name, workers)
        ),
    )


def _pinned(names: Iterable[str], workers: list[Worker]) -> dict[Role, InstanceId]:
    pinned: dict[Role, InstanceId] = {}
    for name in names:
        found = _named(name, workers)
        if not found:
            raise NoLiveInstance(f"no worker {name!r}, which the request is pinned to, is here")
        # A name may have an older bearer that is on its way out.
        worker = max(found, key=lambda worker: worker.is_available)
        if worker.role in pinned:
            raise InvalidRequest(
                f"pinned to more than one {worker.role.value} worker", param="pinned_workers"
            )
        pinned[worker.role] = worker.instance_id
    return pinned


def _named(name: str, workers: list[Worker]) -> list[Worker]:
    """Workers of that name, or of that id in hex."""
    if _INSTANCE_ID.fullmatch(name):
        return [worker for worker in workers if f"{worker.instance_id:016x}" == name]
    return [worker for worker in workers if worker.name == name]
