"""What vLLM is told of the ways that KV takes: to and from other engines, and to host memory.

vLLM takes one connector. Where both ways are wanted that is its MultiConnector, which loads a
prompt from the first that has something of it: what another engine computed for this very request
is pulled, and what is in host memory is loaded for all others.
"""

from __future__ import annotations

import socket
from typing import Any

from libs.common.config import ConfigError
from libs.engine.interface import Leg
from libs.engine.vllm_engine.settings import VllmSettings

PACKAGE = "libs.engine.vllm_engine"

_ROLES = {Leg.PREFILL: "kv_producer", Leg.DECODE: "kv_consumer"}


def transfer_arguments(settings: VllmSettings, *, is_cpu: bool) -> dict[str, Any] | None:
    """Arguments of vLLM's KVTransferConfig; None without any connector.

    Raises ConfigError for a host tier where vLLM has none.
    """
    if settings.host_kv_bytes and is_cpu:
        raise ConfigError(
            "host_kv_bytes is for GPUs: with vLLM on a CPU all KV is in host memory already, of"
            f" which kv_cache_bytes gives the size; got {settings.host_kv_bytes}"
        )
    connectors = []
    if settings.leg in _ROLES:
        connectors.append(_nixl(settings, is_cpu=is_cpu))
    if settings.host_kv_bytes:
        connectors.append(_host_tier(settings.host_kv_bytes))
    match connectors:
        case []:
            return None
        case [only]:
            wanted = only
        case _:
            wanted = {
                "kv_connector": "MultiConnector",
                "kv_role": _ROLES[settings.leg],
                "kv_connector_extra_config": {"connectors": connectors},
            }
    return {
        "kv_buffer_device": "cpu" if is_cpu else "cuda",
        "kv_load_failure_policy": "recompute",
        **wanted,
    }


def _nixl(settings: VllmSettings, *, is_cpu: bool) -> dict[str, Any]:
    from libs.engine.vllm_engine.connector import SIDE_CHANNEL_PORT, TRANSFER_TIMEOUT_SECONDS

    return {
        "kv_connector": "SwitchgearNixlConnector",
        "kv_connector_module_path": f"{PACKAGE}.connector",
        "kv_role": _ROLES[settings.leg],
        "kv_buffer_device": "cpu" if is_cpu else "cuda",
        "kv_connector_extra_config": {
            "kv_lease_duration": settings.kv_lease_seconds,
            TRANSFER_TIMEOUT_SECONDS: settings.transfer_timeout_seconds,
            SIDE_CHANNEL_PORT: settings.nixl_port or _free_port(settings),
        },
    }


def _host_tier(size_bytes: int) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": size_bytes,
            # A conversation's next prompt begins with the last answer.
            "offload_prompt_only": False,
            # Else events have hashes only, and the GPU may have dropped a block, and its name been
            # forgotten, by the time that its copy is complete.
            "self_describing_kv_events": True,
        },
    }


def _free_port(settings: VllmSettings) -> int:
    with socket.create_server((settings.nixl_host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
