"""The decode worker's settings."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

from libs.worker.config import WorkerSettings


class DecodeWorkerSettings(WorkerSettings):
    """Generates tokens, from pulled KV or from prompts that it computes itself."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_DECODE_WORKER_")
