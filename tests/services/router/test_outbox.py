from __future__ import annotations

import pytest

from libs.common.errors import NoLiveInstance, ProtocolViolation
from services.router.core.workers import InstanceId, Role, Worker
from services.router.outbox import Outbox

ERROR = NoLiveInstance("nobody")
DECODER = Worker(
    instance_id=InstanceId(7), name="d", role=Role.DECODE, model="m", block_size_tokens=16
)


def test_who_serves_a_request_waits_for_something_else_to_go_with() -> None:
    wakes: list[None] = []
    outbox = Outbox(4, lambda: wakes.append(None))
    outbox.add_routed(1, DECODER, None)
    assert outbox.take() is None
    assert not wakes
    outbox.add_failure(2, ERROR, InstanceId(9))
    message = outbox.take()
    assert message is not None
    assert [(it.handle, it.decode_worker.name) for it in message.routed] == [(1, "d")]
    assert [(it.handle, it.failed_instance_id) for it in message.failures] == [(2, 9)]
    assert len(wakes) == 1
    assert outbox.take() is None


def test_who_serves_a_request_goes_alone_when_told_to() -> None:
    outbox = Outbox(4, lambda: None)
    outbox.send_routed()
    assert outbox.take() is None
    outbox.add_routed(1, DECODER, None)
    outbox.send_routed()
    message = outbox.take()
    assert message is not None
    assert [it.handle for it in message.routed] == [1]


def test_without_credit_nothing_goes_and_what_comes_meanwhile_goes_together() -> None:
    wakes: list[None] = []
    outbox = Outbox(1, lambda: wakes.append(None))
    outbox.add_failure(1, ERROR, None)
    assert outbox.take() is not None
    for handle in (2, 3):
        outbox.add_failure(handle, ERROR, None)
        assert outbox.take() is None
    wakes.clear()
    outbox.consumed(1)
    assert wakes
    message = outbox.take()
    assert message is not None
    assert [it.handle for it in message.failures] == [2, 3]


def test_a_frontend_that_is_done_with_more_than_there_was_is_told() -> None:
    with pytest.raises(ProtocolViolation, match="between 0 and 0"):
        Outbox(1, lambda: None).consumed(1)
