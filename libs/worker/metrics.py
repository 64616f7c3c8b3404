"""A worker's Prometheus metrics: what the engine can say is read from it when somebody asks, what
happens to requests is counted as it happens, once for each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from libs.common.errors import BY_REASON
from libs.common.kv_events import Tier
from libs.common.metrics import count_from_zero
from libs.engine.interface import Engine, Leg, Prefilled, Start

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REQUESTS = Counter(
    "switchgear_worker_requests",
    "Requests that the engine had, by how they ended.",
    ["leg", "outcome"],
)
REFUSALS = Counter("switchgear_worker_refusals", "Requests that were not taken in.", ["reason"])
count_from_zero(REFUSALS, BY_REASON)
PROMPT_TOKENS = Counter(
    "switchgear_worker_prompt_tokens",
    "Prompt tokens of requests that got so far, by whether they were computed here, cached or"
    " transferred.",
    ["source"],
)
_COMPUTED, _CACHED, _TRANSFERRED = map(PROMPT_TOKENS.labels, ("computed", "cached", "transferred"))
QUEUE_SECONDS = Histogram(
    "switchgear_worker_queue_seconds",
    "From a request's arrival to when the engine began with its prompt.",
    ["leg"],
    buckets=_SECONDS,
)
TRANSFER_SECONDS = Histogram(
    "switchgear_worker_kv_transfer_seconds",
    "How long pulling a prompt's KV took, with vLLM the wait for room included.",
    buckets=_SECONDS,
)


@cache
def _requests(leg: Leg, outcome: str) -> Counter:
    return REQUESTS.labels(leg.name.lower(), outcome)


@cache
def _queue_seconds(leg: Leg) -> Histogram:
    return QUEUE_SECONDS.labels(leg.name.lower())


def request_ended(leg: Leg, outcome: str) -> None:
    """The outcome is a finish reason, or `prefilled`."""
    _requests(leg, outcome).inc()


def prompt_started(leg: Leg, prompt_tokens: int, start: Start) -> None:
    """A prompt is computed and its first token there."""
    _prompt_tokens(prompt_tokens, start.cached_tokens, start.transferred_tokens)
    _queue_seconds(leg).observe(start.queue_seconds)
    if start.transfer_seconds:
        TRANSFER_SECONDS.observe(start.transfer_seconds)


def prompt_prefilled(prompt_tokens: int, prefilled: Prefilled) -> None:
    """A prompt is computed for others."""
    request_ended(Leg.PREFILL, "prefilled")
    _prompt_tokens(prompt_tokens, prefilled.cached_tokens, 0)
    _queue_seconds(Leg.PREFILL).observe(prefilled.queue_seconds)


def _prompt_tokens(prompt_tokens: int, cached_tokens: int, transferred_tokens: int) -> None:
    if cached_tokens:
        _CACHED.inc(cached_tokens)
    if transferred_tokens:
        _TRANSFERRED.inc(transferred_tokens)
    _COMPUTED.inc(max(0, prompt_tokens - cached_tokens - transferred_tokens))


class WorkerCollector(Collector):
    """The engine's load, its cache, and what it pulled from other engines."""

    def __init__(
        self,
        engine: Engine,
        cached_blocks: Callable[[], Mapping[Tier, int]],
        evicted_blocks: Callable[[], Mapping[Tier, int]],
    ) -> None:
        self._engine = engine
        self._cached_blocks = cached_blocks
        self._evicted_blocks = evicted_blocks

    def register(self, registry: CollectorRegistry) -> None:
        """Called once the engine has started."""
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Called from the metrics server's thread; reads plain numbers only."""
        load = self._engine.load()
        moved = self._engine.counters()
        blocks = self._cached_blocks()
        gauges = {
            "running_requests": ("Sequences in the batch", load.running_requests),
            "waiting_requests": ("Requests not in the batch yet", load.waiting_requests),
            "queued_prefill_tokens": ("Prompt tokens to compute", load.queued_prefill_tokens),
            "active_kv_blocks": ("Blocks of sequences in progress", load.active_kv_blocks),
            "total_kv_blocks": ("Blocks the device has room for", load.total_kv_blocks),
            "cached_kv_blocks": ("Blocks that can be reused", blocks[Tier.DEVICE]),
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
        loaded = {Tier.HOST: moved.loaded_host_blocks}
        by_tier = (
            (GaugeMetricFamily, "kv_tier_blocks", "Blocks that can be reused", blocks),
            (
                CounterMetricFamily,
                "kv_evicted_blocks",
                "Blocks that the engine dropped",
                self._evicted_blocks(),
            ),
            (CounterMetricFamily, "kv_loaded_blocks", "Blocks brought back to the device", loaded),
        )
        for family, name, text, numbers in by_tier:
            made = family(f"switchgear_worker_{name}", f"{text}, by tier", labels=["tier"])
            for tier, value in numbers.items():
                made.add_metric([tier.name.lower()], value)
            yield made
