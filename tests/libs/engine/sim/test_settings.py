from typing import Any

import pytest

from libs.engine.sim.core.timing import StepWork
from libs.engine.sim.settings import SimSettings


@pytest.mark.parametrize(
    "bad",
    [
        {"block_size_tokens": 0},
        {"step_ms": -1.0},
        {"kv_cache_tokens": 15},
        {"chunk_tokens": 255},
        {"vocabulary": ()},
        {"eos_probability": 1.5, "eos_token_id": 2},
        {"eos_token_id": None, "eos_probability": 0.1},
        {"transfer_host": "0.0.0.0"},
        {"transfer_timeout_seconds": 0.0},
    ],
)
def test_a_bad_setting_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SimSettings(**bad)


def test_the_cache_is_counted_in_whole_blocks() -> None:
    settings = SimSettings(block_size_tokens=128, kv_cache_tokens=1_000)
    assert settings.limits.total_kv_blocks == 7


def test_timing_models_go_by_name() -> None:
    work = StepWork(prefill_tokens=0, decoding_sequences=1, kv_usage=0.0)
    seconds = {
        name: SimSettings(timing=name, step_ms=3.0).timing_model(work)
        for name in ("default", "fixed", "dynamo_mocker")
    }
    assert seconds == pytest.approx({"default": 0.00635, "fixed": 0.003, "dynamo_mocker": 0.00574})
