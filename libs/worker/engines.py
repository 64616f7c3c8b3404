"""Makes the engine that the settings name. Only here is known which engines there are."""

from __future__ import annotations

from libs.common.config import ConfigError
from libs.engine.interface import Engine, Leg
from libs.worker.config import WorkerSettings


def make_engine(settings: WorkerSettings, leg: Leg) -> Engine:
    """An engine that has not started. `leg` is what the worker is for: PREFILL, DECODE, or WHOLE
    for what needs no other worker's KV.

    Raises ConfigError for settings that do not go together. The imports are here so that a
    simulated worker needs no vLLM, and a real one loads no simulator.
    """
    try:
        if settings.engine == "sim":
            return _sim(settings)
        return _vllm(settings, leg)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _sim(settings: WorkerSettings) -> Engine:
    from libs.engine.sim.engine import SimEngine
    from libs.engine.sim.settings import SimSettings

    default = SimSettings()
    return SimEngine(
        SimSettings(
            timing=settings.sim_timing,
            step_ms=settings.sim_step_ms,
            block_size_tokens=settings.block_size_tokens or default.block_size_tokens,
            kv_cache_tokens=settings.sim_kv_tokens,
            host_kv_bytes=settings.host_kv_bytes,
            host_bytes_per_second=settings.sim_host_bytes_per_second,
            context_length_tokens=settings.max_model_len_tokens or default.context_length_tokens,
            max_running_requests=settings.max_running_requests or default.max_running_requests,
            transfer_timeout_seconds=settings.transfer_timeout_seconds,
            kv_lease_seconds=settings.kv_lease_seconds,
            transfer_host=settings.reachable_host,
            transfer_port=settings.nixl_port,
            embedding_dimensions=(
                settings.sim_embedding_dimensions if settings.task == "embed" else 0
            ),
        )
    )


def _vllm(settings: WorkerSettings, leg: Leg) -> Engine:
    from libs.engine.vllm_engine.engine import VllmEngine
    from libs.engine.vllm_engine.settings import VllmSettings

    return VllmEngine(
        VllmSettings(
            model=settings.model,
            leg=leg,
            task=settings.task,
            dtype=settings.dtype,
            block_size_tokens=settings.block_size_tokens or None,
            max_model_len_tokens=settings.max_model_len_tokens or None,
            kv_cache_bytes=settings.kv_cache_bytes or None,
            host_kv_bytes=settings.host_kv_bytes or None,
            device_memory_fraction=settings.device_memory_fraction or None,
            max_running_requests=settings.max_running_requests or None,
            nixl_host=settings.reachable_host,
            nixl_port=settings.nixl_port,
            kv_lease_seconds=round(settings.kv_lease_seconds),
            transfer_timeout_seconds=settings.transfer_timeout_seconds,
        )
    )
