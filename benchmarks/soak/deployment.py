"""What is soaked: every kind of service, two of what there may be two of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.local import topology
from deploy.local.process import ProcessSpec
from deploy.local.topology import Deployment

CLIENTS = 64
_STEP_MS = 4.0
_KV_TOKENS = 65_536
"""Little, so that all caches and indexes are full long before the end of the warm-up."""

_TOKEN_CACHE_BYTES = 2 << 20
"""Little, for the same reason."""

_KV_LEASE_SECONDS = 5
"""So that what clients left on their way from prefill to decode is gone soon."""


def make_deployment(model: Path, http_port: int) -> Deployment:
    kv = ("--sim-kv-tokens", str(_KV_TOKENS))
    return Deployment(
        engine="sim",
        model=model,
        model_name="soaked-model",
        prefill=1,
        decode=2,
        routers=2,
        http_port=http_port,
        sim_step_ms=_STEP_MS,
        flags={
            "prefill_worker": (*kv, "--kv-lease-seconds", str(_KV_LEASE_SECONDS)),
            "decode_worker": kv,
            "frontend": ("--token-cache-bytes", str(_TOKEN_CACHE_BYTES)),
        },
    )


def processes(
    deployment: Deployment, run_dir: Path, take_port: Callable[[], int]
) -> list[ProcessSpec]:
    """Those of the deployment, each service within `benchmarks.soak.collecting`."""
    return [_collecting(spec) for spec in topology.processes(deployment, run_dir, take_port)]


def _collecting(spec: ProcessSpec) -> ProcessSpec:
    match spec.command:
        case (python, "-m", module, *rest) if module.startswith("services."):
            command = (python, "-m", "benchmarks.soak.collecting", module, *rest)
            return spec.model_copy(update={"command": command})
        case _:
            return spec
