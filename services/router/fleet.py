"""The workers there are: found in etcd, believed once a session to them stands."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import grpc

from libs.common import logs
from libs.common.channels import Channels
from libs.common.discovery import Discovery, Table
from libs.common.identity import WORKER
from services.router.core.agreement import Reason
from services.router.core.estimated_holdings import EstimatedHoldings
from services.router.core.fit import Make, make_of_model
from services.router.core.workers import InstanceId, Role, Worker
from services.router.worker_link import WorkerLink
from switchgear.discovery.v1 import discovery_pb2
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc

log = logs.get(__name__)

RECONNECT_SECONDS = 0.25
CONTROL_WINDOW_RESPONSES = 4
CONTROL_REST_SECONDS = 0.5
"""In which the control session tells no more than a window of what other sessions tell, too. They
may be stuck behind a frontend that does not read."""

_ROLES = {
    discovery_pb2.ROLE_PREFILL_WORKER: Role.PREFILL,
    discovery_pb2.ROLE_DECODE_WORKER: Role.DECODE,
}


class Member:
    """A worker and the way to it.

    A session of the router's own, without requests, tells its load and whether it lives. While
    frontends' sessions tell the load, too, that one hardly gets credit to. A worker that has left
    discovery drains: it gets nothing new, and is forgotten when its session ends.
    """

    def __init__(
        self, worker: Worker, address: str, card: discovery_pb2.ModelCard, channels: Channels
    ) -> None:
        self.worker = worker
        self.address = address
        self.make = Make(card.files_checksum, card.kv_block_size_tokens)
        self.age = (card.created_unix_seconds, card.instance_id)
        """Lower is older, as frontends count it."""
        self.lacking: frozenset[Reason] = frozenset()
        """Why it does not fit its model; empty when it does."""
        self.is_listed = True
        self.was_tried = asyncio.Event()
        """It has answered, or has failed to."""
        self._is_connected = False
        self._links = 0
        """Frontends' sessions to it, which tell its load as soon as its own does."""
        self._control: WorkerLink | None = None
        self._withheld_responses = 0
        """Of the control session, that it has not got credit for."""
        self._rest: asyncio.TimerHandle | None = None
        self._channels = channels
        self.stub = self._connect()

    def _connect(self) -> worker_pb2_grpc.WorkerServiceAsyncStub:
        self._version = self._channels.version
        self._channel = self._channels.open(self.address, WORKER)
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(
            self._channel
        )
        return stub

    def set_listed(self, is_listed: bool) -> None:
        """Whether discovery has it. One that comes back while its session stands is taken at once:
        an idle worker may have nothing to say for long."""
        self.is_listed = is_listed
        self.worker.is_available = is_listed and self._is_connected

    async def run(self) -> None:
        """Keeps the control session up until the worker is neither listed nor there."""
        try:
            while True:
                link = WorkerLink(
                    self.worker, self.stub, CONTROL_WINDOW_RESPONSES, self._on_response
                )
                self._control, self._withheld_responses = link, 0
                try:
                    await link.run()
                except grpc.aio.AioRpcError as error:
                    if self.worker.is_available:
                        log.warning(
                            "worker lost",
                            worker=self.worker.name,
                            address=self.address,
                            status=error.code().name,
                            details=error.details(),
                        )
                    self._channels.failed(self.address, WORKER, error)
                self._is_connected = self.worker.is_available = False
                self.was_tried.set()
                if not self.is_listed:
                    return
                if self._version != self._channels.version:
                    # The old channel would go on showing a certificate that may have expired.
                    await self._channel.close()
                    self.stub = self._connect()
                await asyncio.sleep(RECONNECT_SECONDS)
        finally:
            self.worker.is_available = False
            self.was_tried.set()
            self._control = None
            await self._channel.close()

    def link_opened(self) -> None:
        """A frontend's session to it begins."""
        self._links += 1

    def link_closed(self) -> None:
        """One has ended. After the last one the control session alone tells the load."""
        self._links -= 1
        if not self._links:
            self._give_credit()

    def _give_credit(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._control is not None:
            self._control.consumed(self._withheld_responses)
        self._withheld_responses = 0

    def _on_response(self, link: WorkerLink, response: worker_pb2.SessionResponse) -> None:
        self._withheld_responses += 1
        if not self._links:
            self._give_credit()
        elif self._rest is None:
            loop = asyncio.get_running_loop()
            self._rest = loop.call_later(CONTROL_REST_SECONDS, self._give_credit)
        if self.is_listed and not self.worker.is_available:
            log.info("worker connected", worker=self.worker.name, address=self.address)
        self._is_connected = True
        self.worker.is_available = self.is_listed
        self.was_tried.set()


class Fleet:
    """All workers by id, whatever their model."""

    def __init__(
        self,
        instances: Table[discovery_pb2.Instance],
        cards: Table[discovery_pb2.ModelCard],
        estimate_ttl_seconds: float = 120.0,
        channels: Channels | None = None,
    ) -> None:
        """`estimate_ttl_seconds`: how long a worker without KV events is believed to hold what it
        was given."""
        self.members: dict[InstanceId, Member] = {}
        self.estimated: list[Worker] = []
        """Those whose holdings are estimated, since no KV events tell."""
        self._estimate_ttl_seconds = estimate_ttl_seconds
        self._channels = channels or Channels()
        self._gone_listeners: list[Callable[[Worker], None]] = []
        self._fit_listeners: list[Callable[[Worker], None]] = []
        self._instances = instances
        self._cards = cards
        self._tasks: set[asyncio.Task[None]] = set()
        instances.on_change(self._reconcile)
        cards.on_change(self._reconcile)
        self._reconcile()

    @property
    def workers(self) -> list[Worker]:
        """Everyone known, available or not."""
        return [member.worker for member in self.members.values()]

    def is_known(self, model: str) -> bool:
        """Whether anybody serves the model, ready or not."""
        return any(card.model == model for card in self._cards.values())

    async def settled(self, seconds: float) -> None:
        """Returns once every worker that discovery lists has answered, or has failed to; after so
        many seconds in any case. A router that took requests before would refuse them."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._instances.was_read.wait()
                await self._cards.was_read.wait()
                for member in list(self.members.values()):
                    await member.was_tried.wait()

    def name_of(self, instance_id: InstanceId) -> str:
        """A worker's name; its id in hexadecimal while it is not known."""
        member = self.members.get(instance_id)
        return f"{instance_id:016x}" if member is None else member.worker.name

    def has_events(self, model: str) -> bool:
        """Whether KV events tell what any worker of the model holds."""
        return any(
            member.worker.model == model and member.worker.holdings is None
            for member in self.members.values()
        )

    def lacking(self, name: str) -> frozenset[Reason]:
        """Why workers of a name do not fit their model; empty when they do."""
        each = [m.lacking for m in self.members.values() if m.worker.name == name]
        return frozenset().union(*each)

    def has_common_files(self, worker: Worker) -> bool:
        """Whether the worker's tokenizer and template are those of its model."""
        member = self.members.get(worker.instance_id)
        return member is None or Reason.TOKENIZER_OR_TEMPLATE not in member.lacking

    def on_gone(self, listener: Callable[[Worker], None]) -> None:
        """Calls the listener with every worker that is forgotten, from now on."""
        self._gone_listeners.append(listener)

    def on_fit(self, listener: Callable[[Worker], None]) -> None:
        """Calls the listener with every worker that begins or ceases to fit its model, from now
        on."""
        self._fit_listeners.append(listener)

    def _reconcile(self) -> None:
        listed = {InstanceId(card.instance_id): card for card in self._cards.values()}
        addresses = {item.instance_id: item for item in self._instances.values()}
        for instance_id, card in listed.items():
            instance = addresses.get(instance_id)
            if instance is None or card.role not in _ROLES or not card.kv_block_size_tokens:
                continue
            member = self.members.get(instance_id)
            if member is None:
                self._add(instance_id, instance, card)
            else:
                member.set_listed(True)
        for instance_id, member in self.members.items():
            if instance_id not in listed:
                member.set_listed(False)
        self._compare()

    def _compare(self) -> None:
        """Sees who fits their model. Those that drain are no measure for others."""
        by_model: defaultdict[str, list[Member]] = defaultdict(list)
        for member in self.members.values():
            if member.is_listed:
                by_model[member.worker.model].append(member)
        for members in by_model.values():
            # Frontends go by the eldest decode worker.
            members.sort(key=lambda one: (one.worker.role is not Role.DECODE, one.age))
            model = make_of_model([member.make for member in members])
            for member in members:
                self._set_lacking(member, model)

    def _set_lacking(self, member: Member, model: Make) -> None:
        before, member.lacking = member.lacking, member.make.lacks(model)
        if member.lacking == before:
            return
        worker = member.worker
        if member.lacking:
            log.error(
                "worker does not fit its model",
                worker=worker.name,
                model=worker.model,
                reasons=sorted(reason.value for reason in member.lacking),
                files_checksum=member.make.files_checksum,
                files_checksum_of_model=model.files_checksum,
                block_size_tokens=member.make.block_size_tokens,
                block_size_tokens_of_model=model.block_size_tokens,
            )
        else:
            log.info("worker fits its model now", worker=worker.name, model=worker.model)
        for listener in self._fit_listeners:
            listener(worker)

    def _add(
        self,
        instance_id: InstanceId,
        instance: discovery_pb2.Instance,
        card: discovery_pb2.ModelCard,
    ) -> None:
        worker = Worker(
            instance_id=instance_id,
            name=instance.name,
            role=_ROLES[card.role],
            model=card.model,
            block_size_tokens=card.kv_block_size_tokens,
            transfer_backend=card.transfer_backend,
        )
        if not card.publishes_kv_events:
            worker.holdings = EstimatedHoldings(
                capacity_blocks=max(1, card.total_kv_blocks),
                ttl_seconds=self._estimate_ttl_seconds,
            )
            self.estimated.append(worker)
        member = self.members[instance_id] = Member(worker, instance.address, card, self._channels)
        task = asyncio.create_task(member.run(), name=f"worker {instance.name}")
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            self.members.pop(instance_id, None)
            self.estimated = [other for other in self.estimated if other is not worker]
            for listener in self._gone_listeners:
                listener(worker)
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("worker session failed", worker=instance.name, exc_info=error)
            self._reconcile()

        task.add_done_callback(forget)

    async def close(self) -> None:
        """Ends all sessions."""
        self._instances, self._cards = Table(), Table()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def watching_workers(
    discovery: Discovery, estimate_ttl_seconds: float, channels: Channels
) -> AsyncIterator[Fleet]:
    """Follows the workers of the namespace while the body runs."""
    async with (
        discovery.watching("instances/", discovery_pb2.Instance) as instances,
        discovery.watching("models/", discovery_pb2.ModelCard) as cards,
    ):
        fleet = Fleet(instances, cards, estimate_ttl_seconds, channels)
        try:
            yield fleet
        finally:
            await fleet.close()
