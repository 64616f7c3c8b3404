"""What Prometheus is told."""

from prometheus_client import Counter, Gauge

blocks = Gauge(
    "switchgear_kv_indexer_blocks", "Blocks in the index, once for every worker that holds them."
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
snapshots = Counter(
    "switchgear_kv_indexer_snapshots",
    "Snapshots asked for, by reason and by what came of it: taken or failed.",
    ["reason", "outcome"],
)
queries = Counter("switchgear_kv_indexer_queries", "Prompts looked up.")
