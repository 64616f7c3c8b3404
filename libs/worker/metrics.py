"""A worker's Prometheus metrics: read from the engine when somebody asks, never counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from libs.engine.interface import Engine


class WorkerCollector(Collector):
    """The engine's load and what it pulled from other engines."""

    def __init__(self, engine: Engine, cached_blocks: Callable[[], int]) -> None:
        self._engine = engine
        self._cached_blocks = cached_blocks

    def register(self, registry: CollectorRegistry) -> None:
        """Called once the engine has started."""
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called from the metrics server's thread; reads plain numbers only."""
        load = self._engine.load()
        moved = self._engine.counters()
        gauges = {
            "running_requests": ("Sequences in the batch", load.running_requests),
            "waiting_requests": ("Requests not in the batch yet", load.waiting_requests),
            "queued_prefill_tokens": ("Prompt tokens to compute", load.queued_prefill_tokens),
            "active_kv_blocks": ("Blocks of sequences in progress", load.active_kv_blocks),
            "total_kv_blocks": ("Blocks the device has room for", load.total_kv_blocks),
            "cached_kv_blocks": ("Blocks that can be reused", self._cached_blocks()),
        }
        counters = {
            "kv_transfer_bytes": ("KV pulled from prefill workers", moved.transferred_bytes),
            "kv_transfer_blocks": ("Blocks pulled from prefill workers", moved.transferred_blocks),
            "kv_transfer_failures": (
                "Pulls that failed; their prompts were computed here",
                moved.transfer_failures,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"switchgear_worker_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"switchgear_worker_{name}", text, value)
