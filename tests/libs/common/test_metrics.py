"""What every service tells Prometheus about itself."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.registry import REGISTRY

from libs.common.grpc_server import serving
from libs.common.metrics import count_from_zero, serving_metrics
from tests.fixtures.eventually import until

WATCH = "/grpc.health.v1.Health/Watch"


def tasks() -> float:
    return REGISTRY.get_sample_value("switchgear_asyncio_tasks") or 0.0


def calls(method: str) -> float:
    return REGISTRY.get_sample_value("switchgear_grpc_calls", {"method": method}) or 0.0


async def test_tasks_are_counted_from_another_thread_and_only_while_they_run() -> None:
    end = asyncio.Event()
    with serving_metrics("127.0.0.1", 0):
        before = await asyncio.to_thread(tasks)
        waiting = [asyncio.create_task(end.wait()) for _ in range(3)]
        assert await asyncio.to_thread(tasks) == before + 3
        end.set()
        await asyncio.wait(waiting)
        assert await asyncio.to_thread(tasks) == before


async def test_a_call_is_counted_until_its_client_cancels_it() -> None:
    async with (
        serving("127.0.0.1", 0, lambda server: None, [], grace_seconds=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        assert calls(WATCH) == 1
        watching.cancel()
        await until(lambda: calls(WATCH) == 0)


def test_what_has_not_happened_yet_is_told_as_zero() -> None:
    registry = CollectorRegistry()
    counter = Counter("failures", "", ["kind", "reason"], registry=registry)
    count_from_zero(counter, ["a"], ["lost", "late"])
    counter.labels("a", "late").inc()
    values = {
        reason: registry.get_sample_value("failures_total", {"kind": "a", "reason": reason})
        for reason in ("lost", "late")
    }
    assert values == {"lost": 0, "late": 1}
