"""One frontend's ways to the workers: a session to each that any of its requests went to."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from services.router.core.workers import InstanceId, Worker
from services.router.fleet import Fleet, Member
from services.router.worker_link import WorkerLink
from switchgear.worker.v1 import worker_pb2


class WorkerLinks:
    """Opened when they are first needed, gone when they break."""

    def __init__(
        self,
        fleet: Fleet,
        window_responses: int,
        *,
        run: Callable[[Coroutine[Any, Any, None]], None],
        on_response: Callable[[WorkerLink, worker_pb2.SessionResponse], None],
        on_end: Callable[[WorkerLink, Member, str], None],
    ) -> None:
        """`run` owns what it is given until that ends. `on_end` is told who is lost, and why."""
        self._fleet = fleet
        self._window_responses = window_responses
        self._run = run
        self._on_response = on_response
        self._on_end = on_end
        self._links: dict[InstanceId, WorkerLink] = {}

    def get(self, instance_id: InstanceId) -> WorkerLink | None:
        """The one that stands, if any."""
        return self._links.get(instance_id)

    def open_to(self, worker: Worker) -> WorkerLink | None:
        """The one that stands, or a new one; None when the worker is gone."""
        link = self._links.get(worker.instance_id)
        if link is None:
            member = self._fleet.members.get(worker.instance_id)
            if member is None or not worker.is_available:
                return None
            link = WorkerLink(worker, member.stub, self._window_responses, self._on_response)
            self._links[worker.instance_id] = link
            self._run(self._follow(link, member))
        return link

    async def _follow(self, link: WorkerLink, member: Member) -> None:
        reason = "the worker ended the session"
        member.link_opened()
        try:
            await link.run()
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        finally:
            member.link_closed()
            del self._links[link.worker.instance_id]
            self._on_end(link, member, reason)
