"""The KV indexer's settings."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.common.config import NatsSettings


class KvIndexerSettings(NatsSettings):
    """Follows the workers' KV events and tells routers who holds which blocks."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_KV_INDEXER_")

    max_index_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Memory for the index: 48 bytes for a block, however many workers hold it; 160 where the index
    is the one in Python. When it is used up, the blocks that were not matched for longest are
    evicted."""

    recoveries_at_once: int = Field(default=8, ge=1, le=1_000)
    """How many workers are asked at the same time for what the index lacks. More makes a restarted
    index whole sooner; fewer keeps answers quick meanwhile."""

    recovery_timeout_seconds: float = Field(default=5.0, gt=0)
    """How long a worker may take to send missed batches, or a whole snapshot, before it is asked
    again."""

    silent_after_seconds: float = Field(default=5.0, gt=1)
    """A worker not heard of for this long, heartbeats included, is degraded: its blocks may have
    changed. Workers send something every second."""
