"""A simulated deployment whose decode workers have a host tier below a small device: what was
evicted there is known, priced, loaded and compared."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import topology
from libs.common.kv_events import Tier
from services.kv_indexer import verify
from switchgear.kv_events.v1 import kv_events_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.running import LONG_PROMPT, Answer, Running, running
from tests.fixtures.eventually import eventually

DEVICE_TOKENS = 2_048
HOST_BYTES = 1 << 30
"""8,192 tokens of the simulator's."""

OTHERS = 6
OTHERS_TOKENS = 16
STEP_MS = 20
"""The others' answers take longer than the second for which a router takes a prompt that it has
sent to be on the device."""


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    tiers = ("--sim-kv-tokens", str(DEVICE_TOKENS), "--host-kv-bytes", str(HOST_BYTES))
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        flags={
            "decode_worker": ("--sim-timing", "fixed", "--sim-step-ms", str(STEP_MS), *tiers),
            "router": ("--overlap-timeout-seconds", "10"),
        },
        prefill=1,
        decode=3,
        indexers=1,
    ) as it:
        yield it


async def held(deployment: Running, worker: str) -> tuple[int, int]:
    """Blocks on a worker's device and in its host memory."""
    async with deployment.channel(worker) as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        status = await stub.GetStatus(worker_pb2.GetStatusRequest())
    return status.cached_kv_blocks, status.cached_host_kv_blocks


async def index_follows(deployment: Running) -> None:
    """Returns when the index has as many blocks as the workers, in all tiers."""
    workers = [p.name for p in deployment.cluster.processes() if "_worker-" in p.name]

    async def is_equal() -> bool:
        blocks = [sum(await held(deployment, worker)) for worker in workers]
        async with deployment.channel("kv_indexer-0") as channel:
            indexer: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
                kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            )
            status = await indexer.GetStatus(kv_indexer_pb2.GetStatusRequest())
        return len(status.workers) == len(workers) and (
            sum(worker.blocks for worker in status.workers) == sum(blocks)
        )

    await eventually(is_equal)


async def explanation(deployment: Running, answer: Answer) -> router_pb2.Explanation:
    """Why an answer was computed where it was."""
    async with deployment.channel("router-0") as channel:
        router: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.ExplainDecisionRequest(request_id=answer.body["id"])
        (found,) = (await router.ExplainDecision(request)).explanations
    return found


async def right(deployment: Running) -> list[kv_indexer_pb2.Comparison]:
    """The comparison of every worker, all of which must be equal."""
    answer = await verify.ask("kv_indexer-0", deployment.grpc_address("kv_indexer-0"), 10)
    assert verify.verdict(answer) == verify.EQUAL, answer
    return list(answer.comparisons)


async def test_a_conversation_in_host_memory_goes_back_there_and_is_loaded(
    deployment: Running,
) -> None:
    opening = "A conversation to come back to. " + LONG_PROMPT
    first = await asyncio.to_thread(deployment.chat, opening)
    home = first.decode_worker
    assert home is not None
    for number in range(OTHERS):
        other = f"Another one, number {number}. " + LONG_PROMPT
        pinned = {"x-switchgear-pin": home}
        await asyncio.to_thread(deployment.chat, other, pinned, max_tokens=OTHERS_TOKENS)
    await index_follows(deployment)
    assert (await held(deployment, home))[1] > 0
    loaded_blocks = deployment.metric(home, "switchgear_worker_kv_loaded_blocks_total", tier="host")

    again = await asyncio.to_thread(deployment.chat, opening)

    assert (again.decode_worker, again.prefill_worker) == (home, None)
    assert again.text == first.text
    prompt_tokens = again.body["usage"]["prompt_tokens"]
    assert again.cached_tokens == (prompt_tokens - 1) // 16 * 16
    why = await explanation(deployment, again)
    chosen, *_ = why.decode.candidates
    assert chosen.worker.name == home
    # All of it, but for what the others' common beginning keeps on the device.
    assert chosen.host_blocks > 30
    assert chosen.overlap_blocks * 16 == again.cached_tokens
    assert chosen.new_prefill_tokens == round(
        prompt_tokens - 16 * chosen.overlap_blocks + 0.25 * 16 * chosen.host_blocks
    )
    assert why.decode.reported_cached_tokens == why.decode.predicted_cached_tokens
    assert chosen.host_blocks == loaded_blocks_since(deployment, home, loaded_blocks)
    by_tier = {
        tier: deployment.metric(home, "switchgear_worker_kv_tier_blocks", tier=tier)
        for tier in ("device", "host")
    }
    assert (by_tier["device"], by_tier["host"]) == await held(deployment, home)


def loaded_blocks_since(deployment: Running, worker: str, before: float) -> float:
    now = deployment.metric(worker, "switchgear_worker_kv_loaded_blocks_total", tier="host")
    return now - before


async def test_the_index_equals_the_workers_by_tier_also_after_a_restart(
    deployment: Running,
) -> None:
    await index_follows(deployment)
    before = await right(deployment)
    in_host = [
        tier.equal_blocks
        for comparison in before
        for tier in comparison.lower_tiers
        if tier.tier == kv_events_pb2.TIER_HOST
    ]
    assert sum(in_host) > 0
    await asyncio.to_thread(deployment.cluster.restart, "kv_indexer-0", 30)
    await index_follows(deployment)
    after = await right(deployment)
    assert [it.lower_tiers for it in after] == [it.lower_tiers for it in before]


async def test_the_command_has_a_line_for_each_tier(deployment: Running) -> None:
    await index_follows(deployment)
    command = (sys.executable, "-m", "deploy.local", "verify")
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, "--run-dir", str(deployment.cluster.run_dir)],
        cwd=topology.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == verify.EQUAL, done.stdout + done.stderr
    tiers = {line.split()[3] for line in done.stdout.splitlines()[1:]}
    assert tiers == {Tier.DEVICE.name.lower(), Tier.HOST.name.lower()}
