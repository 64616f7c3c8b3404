"""What one frontend is told next: everything there is, in one message, as soon as it has credit."""

from __future__ import annotations

from collections.abc import Callable

from libs.common import grpc_errors
from libs.common.credit import Credit
from libs.common.errors import SwitchgearError
from services.router.core.workers import InstanceId, Worker
from services.router.relayed_request import ComputedPrompt
from services.router.worker_link import Handle, WorkerLink
from switchgear.router.v1 import router_pb2

MAX_OUTPUTS_BYTES = 16 << 20
"""Of what several workers sent, in one message: it has a size limit, and vectors that wait for a
slow frontend are many times as large as tokens."""


class Outbox:
    """The next message, and which workers get credit when it leaves."""

    def __init__(self, window_responses: int, wake: Callable[[], None]) -> None:
        """`wake` is called whenever there may be something to take."""
        self._credit = Credit(window_responses)
        self._wake = wake
        self._message = router_pb2.SessionResponse()
        self._links: list[WorkerLink] = []
        """For each of the message's outputs, where it came from."""
        self._outputs_bytes = 0
        """Of all of them."""
        self._is_due = False
        """Whether there is something that has to be sent for its own sake."""

    def consumed(self, responses: int) -> None:
        """The frontend is done with so many messages, in all. Raises ProtocolViolation."""
        self._credit.consumed(responses)
        if self._is_due:
            self._wake()

    def add_outputs(self, outputs: bytes, link: WorkerLink) -> None:
        """Passes on what a worker wrote."""
        self._message.outputs.append(outputs)
        self._links.append(link)
        self._outputs_bytes += len(outputs)
        self._is_due = True
        self._wake()

    def add_failure(
        self, handle: Handle, error: SwitchgearError, instance_id: InstanceId | None
    ) -> None:
        """A request has failed, and perhaps somebody is to be left out when it is tried again."""
        self._message.failures.add(
            handle=handle,
            error=grpc_errors.to_message(error),
            failed_instance_id=instance_id or 0,
        )
        self._is_due = True
        self._wake()

    def add_routed(self, handle: Handle, decoder: Worker, computed: ComputedPrompt | None) -> None:
        """Who serves a request. Goes with its first outputs, or whatever else is sent before:
        nobody waits for it."""
        routed = self._message.routed.add(handle=handle)
        routed.decode_worker.instance_id = decoder.instance_id
        routed.decode_worker.name = decoder.name
        if computed is not None:
            routed.prefill_worker.instance_id = computed.worker.instance_id
            routed.prefill_worker.name = computed.worker.name
            routed.prefill_cached_tokens = computed.cached_tokens

    def send_routed(self) -> None:
        """Nothing may follow that would take it along."""
        if self._message.routed:
            self._is_due = True
            self._wake()

    def take(self) -> router_pb2.SessionResponse | None:
        """The next message to send; None when there is nothing, or no credit."""
        if not self._is_due or self._credit.is_exhausted:
            return None
        message, self._message = self._message, router_pb2.SessionResponse()
        links, self._links = self._links, []
        self._is_due = False
        if self._outputs_bytes > MAX_OUTPUTS_BYTES and len(links) > 1:
            self._put_back(message, links)
        else:
            self._outputs_bytes = 0
        self._credit.sent()
        for link in links:
            link.consumed(1)
        return message

    def _put_back(self, message: router_pb2.SessionResponse, links: list[WorkerLink]) -> None:
        """Leaves outputs beyond the limit for the next message, and failures, which come last."""
        kept_bytes = number = 0
        while not number or kept_bytes + len(message.outputs[number]) <= MAX_OUTPUTS_BYTES:
            kept_bytes += len(message.outputs[number])
            number += 1
        self._message.outputs.extend(message.outputs[number:])
        self._message.failures.extend(message.failures)
        self._links = links[number:]
        self._outputs_bytes -= kept_bytes
        del message.outputs[number:], links[number:]
        message.ClearField("failures")
        self._is_due = True
        self._wake()
