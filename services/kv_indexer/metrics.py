"""What Prometheus is told."""

from prometheus_client import Counter, Gauge, Histogram

from libs.common.metrics import count_from_zero
from services.kv_indexer.core.follower import RecoveryReason

blocks = Gauge(
    "switchgear_kv_indexer_blocks", "Blocks in the index, once for every worker that holds them."
)
is_compiled = Gauge(
    "switchgear_kv_indexer_is_compiled", "1 where the index is the compiled one, 0 for Python's."
)
workers = Gauge("switchgear_kv_indexer_workers", "Live workers that publish KV events.")
degraded = Gauge(
    "switchgear_kv_indexer_degraded",
    "Workers whose blocks may be wrong just now, by reason.",
    ["reason"],
)
batches = Counter(
    "switchgear_kv_indexer_batches",
    "KV event batches and heartbeats of live workers.",
)
foreign_batches = Counter(
    "switchgear_kv_indexer_foreign_batches",
    "Batches of workers that are not registered, or not with that model and block size.",
)
recoveries = Counter(
    "switchgear_kv_indexer_recoveries",
    "What workers were asked for, batches or snapshot, why, and what came of it: taken, gone or"
    " failed.",
    ["kind", "reason", "outcome"],
)
count_from_zero(recoveries, ["batches", "snapshot"], RecoveryReason, ["taken", "gone", "failed"])
recovery_seconds = Histogram(
    "switchgear_kv_indexer_recovery_seconds",
    "From asking a worker for batches or a snapshot to their being in the index.",
    ["kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
lag_batches = Gauge(
    "switchgear_kv_indexer_lag_batches",
    "Batches heard of that the index does not include, over all workers.",
)
lag_seconds = Gauge(
    "switchgear_kv_indexer_lag_seconds",
    "For how long the worker that has been degraded longest has been so.",
)
queries = Counter("switchgear_kv_indexer_queries", "Prompts looked up.")
