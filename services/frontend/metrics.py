"""What the frontend tells Prometheus. docs/metrics.md has them all."""

from __future__ import annotations

from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import REGISTRY

from libs.common.errors import BY_REASON
from libs.common.metrics import count_from_zero

_TTFT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
_ITL_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_RETRIED = tuple(reason for reason, error in BY_REASON.items() if error.is_retryable)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class ModelMetrics:
    """Those of one model, found once: finding a labelled metric costs more than counting."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self.request_seconds = metrics.request_seconds.labels(model)
        self.ttft_seconds = metrics.ttft_seconds.labels(model)
        self.itl_seconds = metrics.itl_seconds.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.completion_tokens = metrics.completion_tokens.labels(model)
        count_from_zero(metrics.migrations, [model], _RETRIED)


class FrontendMetrics:
    """Model labels are names of served models, never what a client wrote."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, labelnames=["model"], registry=registry)
        self.requests = counter(
            "switchgear_frontend_requests", "Requests answered.", ["model", "endpoint", "status"]
        )
        self.in_flight = Gauge(
            "switchgear_frontend_in_flight_requests", "Requests being served.", registry=registry
        )
        self.request_seconds = histogram(
            "switchgear_frontend_request_seconds",
            "From a request's acceptance to its last token.",
            buckets=_REQUEST_SECONDS,
        )
        self.ttft_seconds = histogram(
            "switchgear_frontend_ttft_seconds",
            "From a request's acceptance to its first token.",
            buckets=_TTFT_SECONDS,
        )
        self.itl_seconds = histogram(
            "switchgear_frontend_itl_seconds",
            "Gap between output tokens; the mean of those that arrived together.",
            buckets=_ITL_SECONDS,
        )
        self.prompt_tokens = counter(
            "switchgear_frontend_prompt_tokens",
            "Prompt tokens of requests that got a first token.",
            ["model"],
        )
        self.cached_tokens = counter(
            "switchgear_frontend_cached_tokens",
            "Prompt tokens that a worker had cached.",
            ["model"],
        )
        self.completion_tokens = counter(
            "switchgear_frontend_completion_tokens",
            "Output tokens, also of requests that failed later.",
            ["model"],
        )
        self.migrations = counter(
            "switchgear_frontend_migrations",
            "Requests submitted again after an attempt was lost.",
            ["model", "reason"],
        )
        self.errors = counter(
            "switchgear_frontend_errors",
            "Requests that failed, before or after the first token.",
            ["reason"],
        )
        self.disconnects = counter(
            "switchgear_frontend_disconnects", "Requests whose client left before the end."
        )
        count_from_zero(self.errors, BY_REASON)
        self.of = cache(partial(ModelMetrics, self))
        """The metrics of a model."""
        self.requests_of = cache(self.requests.labels)
        """Of a model, an endpoint and a status."""
