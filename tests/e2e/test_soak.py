"""A few thousand requests of all kinds, and nothing is left of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.deployment import CLIENTS, make_deployment, processes
from benchmarks.soak.run import soak
from benchmarks.soak.verdict import leaks
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts

REQUESTS = 3_000
# Caches are still being filled: what shows in so few requests is a prompt or an answer kept whole.
MAX_BYTES_PER_REQUEST = 8_000


@pytest.mark.timeout(240)
async def test_nothing_is_left_of_thousands_of_requests(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    take_port = FreePorts().take
    deployment = make_deployment(tokenizer_folder, take_port())
    with LocalCluster(tmp_path) as cluster:
        cluster.start(processes(deployment, tmp_path, take_port))
        cluster.wait_ready(60)
        outcome = await soak(
            cluster,
            deployment,
            requests=REQUESTS,
            warm_up_requests=1_000,
            clients=CLIENTS,
            max_bytes_per_request=MAX_BYTES_PER_REQUEST,
        )
    assert sum(sum(one.counts.values()) for one in outcome.outcomes) == REQUESTS + 1_000
    assert leaks(outcome) == []
