"""What the router counts of requests on their way."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from libs.common.errors import BY_REASON
from libs.common.metrics import count_from_zero

_REQUESTS = Counter(
    "switchgear_router_requests_total", "Requests given to a decode worker, by how", ["mode"]
)
WHOLE, DISAGGREGATED = _REQUESTS.labels("whole"), _REQUESTS.labels("disaggregated")
PREFILL_FALLBACKS = Counter(
    "switchgear_router_prefill_fallbacks_total",
    "Prompts that a decode worker computed because the prefill leg failed",
    ["reason"],
)
# The router's own reasons, and those of errors.
count_from_zero(PREFILL_FALLBACKS, ["timeout", "engine", *(each.lower() for each in BY_REASON)])
PREFILL_SECONDS = Histogram(
    "switchgear_router_prefill_leg_seconds",
    "From giving a prompt to a prefill worker to its KV being there.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
FAILURES = Counter(
    "switchgear_router_failures_total", "Requests handed back to the frontend", ["reason"]
)
count_from_zero(FAILURES, BY_REASON)
PROMPT_TOKENS = Counter(
    "switchgear_router_prompt_tokens_total", "Prompt tokens of requests that were routed"
)
OVERLAP_TOKENS = Counter(
    "switchgear_router_overlap_tokens_total",
    "Prompt tokens that the chosen worker was known to hold",
)
