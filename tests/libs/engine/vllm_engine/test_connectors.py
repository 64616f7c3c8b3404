from pathlib import Path

import pytest

from libs.common.config import ConfigError
from libs.engine.interface import Leg
from libs.engine.vllm_engine import connectors
from libs.engine.vllm_engine.settings import VllmSettings


def settings(leg: Leg, host_kv_bytes: int | None = None) -> VllmSettings:
    return VllmSettings(model=Path("model"), leg=leg, host_kv_bytes=host_kv_bytes)


def test_a_worker_that_needs_no_other_and_no_host_memory_has_no_connector() -> None:
    assert connectors.transfer_arguments(settings(Leg.WHOLE), is_cpu=True) is None


def test_a_host_tier_alone_is_vllms_offloading() -> None:
    arguments = connectors.transfer_arguments(settings(Leg.WHOLE, 1 << 30), is_cpu=False)
    assert arguments is not None
    assert arguments["kv_connector"] == "OffloadingConnector"
    assert arguments["kv_connector_extra_config"]["cpu_bytes_to_use"] == 1 << 30


@pytest.mark.parametrize("leg", Leg)
def test_a_host_tier_on_a_cpu_is_refused_by_name(leg: Leg) -> None:
    with pytest.raises(ConfigError, match=r"host_kv_bytes is for GPUs.* got 1024"):
        connectors.transfer_arguments(settings(leg, 1024), is_cpu=True)


def test_a_host_tier_for_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="host_kv_bytes is for engines that generate"):
        VllmSettings(model=Path("model"), leg=Leg.WHOLE, task="embed", host_kv_bytes=1024)
