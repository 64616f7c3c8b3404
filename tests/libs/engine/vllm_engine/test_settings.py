from pathlib import Path

import pytest

from libs.engine.interface import Leg
from libs.engine.vllm_engine.settings import LEASE_MARGIN_SECONDS, VllmSettings


def test_a_pull_begun_at_the_end_of_a_session_ends_before_the_lease_does() -> None:
    settings = VllmSettings(
        model=Path("model"), leg=Leg.PREFILL, kv_lease_seconds=30, transfer_timeout_seconds=5.0
    )
    last_end = settings.session_seconds + settings.transfer_timeout_seconds
    assert last_end + LEASE_MARGIN_SECONDS == settings.kv_lease_seconds


def test_a_lease_too_short_for_a_pull_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_lease_seconds .* got 6 and 5\.0"):
        VllmSettings(model=Path("model"), leg=Leg.DECODE, kv_lease_seconds=6)
