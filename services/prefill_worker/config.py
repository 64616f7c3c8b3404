"""The prefill worker's settings."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

from libs.worker.config import WorkerSettings


class PrefillWorkerSettings(WorkerSettings):
    """Computes prompts and keeps their KV until a decode worker has pulled it."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_PREFILL_WORKER_")
