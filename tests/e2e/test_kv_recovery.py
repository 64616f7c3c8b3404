"""Real workers, indexers, etcd, NATS: whatever breaks, the index equals the workers' truth again.

Each test prints how long that took (`pytest -s`). `python -m benchmarks.kv_recovery` does the same
with more blocks and longer outages.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.kv_recovery import faults
from benchmarks.kv_recovery.deployment import IndexDeployment, NotRight, Position, running
from deploy.local import topology
from libs.common.kv_events import all_subjects, subject
from libs.common.nats_client import connecting
from services.kv_indexer import verify
from switchgear.kv_events.v1 import kv_events_pb2
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import ServerProcess

BLOCKS = 2_048
RIGHT_SECONDS = 30.0


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[IndexDeployment]:
    folder = tmp_path_factory.mktemp("run")
    with running(folder, tokenizer_folder, workers=2, indexers=2, blocks=BLOCKS) as it:
        yield it


def report(what: str, seconds: dict[str, float]) -> None:
    print(f"\n{what}:", ", ".join(f"{name} {took:.3f} s" for name, took in seconds.items()))


def recoveries(deployment: IndexDeployment, indexer: str, **labels: str) -> float:
    """How many an indexer counts, with these labels among others."""
    port = deployment.cluster.process(indexer).spec.ports["metrics"]
    text = httpx.get(f"http://{topology.HOST}:{port}/metrics", timeout=10).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("switchgear_kv_indexer_recoveries_total{")
        and all(f'{key}="{value}"' in line for key, value in labels.items())
    )


async def right(deployment: IndexDeployment) -> dict[int, Position]:
    """Where the workers are, once every indexer is right about it."""
    positions = await deployment.positions()
    await deployment.until_right(positions, time.monotonic(), RIGHT_SECONDS)
    return positions


async def until_all_moved(deployment: IndexDeployment) -> None:
    """Returns when every worker has numbered ten batches more."""
    before = await deployment.positions()

    async def have_moved() -> bool:
        now = await deployment.positions()
        return all(now[worker][1] >= number + 10 for worker, (_, number) in before.items())

    await eventually(have_moved)


async def test_events_lost_while_nats_is_down_are_recovered(deployment: IndexDeployment) -> None:
    before = await right(deployment)
    counted = {name: recoveries(deployment, name, outcome="taken") for name in deployment.indexers}
    seconds = await faults.nats_outage(deployment, outage_seconds=1.5, seed=1)
    report("NATS gone for 1.5 s under load", seconds)
    after = await deployment.positions()
    assert all(after[worker] > before[worker] for worker in before)
    for name in deployment.indexers:
        assert recoveries(deployment, name, outcome="taken") > counted[name]


async def test_an_indexer_killed_under_load_is_right_again_after_its_restart(
    deployment: IndexDeployment,
) -> None:
    await deployment.fill("decode_worker-0", BLOCKS, seed=2)
    await right(deployment)
    seconds = await faults.indexer_restart(deployment, "kv_indexer-0", seed=3)
    report("indexer killed and restarted under load", seconds)
    assert recoveries(deployment, "kv_indexer-0", kind="snapshot", outcome="taken") > 0
    await right(deployment)


async def test_a_worker_restarted_at_its_address_takes_the_place_of_the_one_that_died(
    deployment: IndexDeployment,
) -> None:
    before = await right(deployment)
    seconds = await faults.worker_restart(deployment, "decode_worker-1", seed=4)
    report("worker killed and restarted at its address", seconds)
    after = await right(deployment)
    assert len(after.keys() & before.keys()) == 1
    assert len(after) == len(before) == 2


async def test_two_indexers_become_right_and_stay_equal(deployment: IndexDeployment) -> None:
    async with deployment.under_load(seed=5):
        for _ in range(3):
            await until_all_moved(deployment)
            await right(deployment)
    await right(deployment)
    first, second = [
        (await verify.ask(name, deployment.address(name), timeout_seconds=10)).comparisons
        for name in deployment.indexers
    ]
    assert list(first) == list(second)
    assert all(comparison.equal_blocks for comparison in first)


async def verify_command(deployment: IndexDeployment, *flags: str) -> tuple[int | None, str]:
    """Its exit status and what it printed."""
    etcd_url = deployment.cluster.process("etcd-0").spec.address
    where = ("--etcd-url", etcd_url, "--namespace", topology.NAMESPACE)
    return await command("services.kv_indexer", "verify", *where, *flags)


async def command(module: str, *arguments: str) -> tuple[int | None, str]:
    """Exit status of a command, and what it printed on either stream."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_the_command_calls_a_right_index_equal(deployment: IndexDeployment) -> None:
    await right(deployment)
    status, out = await verify_command(deployment)
    assert status == verify.EQUAL, out
    lines = out.splitlines()[1:]
    assert sorted(line.split()[:2] for line in lines) == [
        [indexer, worker] for indexer in deployment.indexers for worker in deployment.workers
    ]
    assert all(line.endswith("equal") for line in lines)


async def test_the_launcher_verifies_what_it_runs(deployment: IndexDeployment) -> None:
    await right(deployment)
    run_dir = str(deployment.cluster.run_dir)
    status, out = await command("deploy.local", "verify", "--run-dir", run_dir)
    assert status == verify.EQUAL, out
    assert len(out.splitlines()) == 1 + len(deployment.indexers) * len(deployment.workers)


async def test_the_command_without_an_indexer_to_ask_is_no_success(
    deployment: IndexDeployment,
) -> None:
    status, out = await verify_command(deployment, "--namespace", "nobody")
    assert status == verify.NOT_COMPARED
    assert "no KV indexer is registered in namespace nobody" in out


class UnreliableRelay:
    """Carries KV events from the workers' NATS to the indexers', as badly as it is told to."""

    def __init__(self, to: Client, seed: int) -> None:
        self._to = to
        self._random = random.Random(seed)
        self._waiting: list[Msg] = []
        self.is_losing_events = False
        """Heartbeats go through all the same."""
        self.shuffled_together = 1
        """So many messages leave in any order, and some of them twice."""
        self.lost = self.shuffled = 0

    async def take(self, message: Msg) -> None:
        batch = kv_events_pb2.KvEventBatch.FromString(message.data)
        if self.is_losing_events and batch.events:
            self.lost += 1
            return
        self._waiting.append(message)
        if len(self._waiting) >= self.shuffled_together:
            await self.flush()

    async def flush(self) -> None:
        """Sends what waits for more to be shuffled with."""
        leaving = [*self._waiting, *self._random.sample(self._waiting, len(self._waiting) // 2)]
        self._waiting.clear()
        self._random.shuffle(leaving)
        self.shuffled += 1
        for each in leaving:
            await self._to.publish(each.subject, each.data)

    async def forge(self, worker: int, position: Position, blocks: list[int]) -> None:
        """Sends a batch that the worker never made, as the one after `position`."""
        epoch, number = position
        stored = kv_events_pb2.BlocksStored(sequence_hashes=blocks, tier=kv_events_pb2.TIER_DEVICE)
        batch = kv_events_pb2.KvEventBatch(
            instance_id=worker,
            model="test-model",
            block_size_tokens=16,
            epoch=epoch,
            sequence_number=number + 1,
            events=[kv_events_pb2.KvEvent(stored=stored)],
        )
        await self._to.publish(subject(topology.NAMESPACE, worker), batch.SerializeToString())


@pytest.fixture
async def relayed(
    tmp_path: Path, tokenizer_folder: Path, start_nats: Callable[[], ServerProcess]
) -> AsyncIterator[tuple[IndexDeployment, UnreliableRelay]]:
    """A worker, and indexers that hear of it through a relay only."""
    indexers_nats = start_nats()
    with running(
        tmp_path / "run",
        tokenizer_folder,
        workers=1,
        indexers=2,
        blocks=BLOCKS,
        indexer_flags=("--nats-url", indexers_nats.url),
    ) as deployment:
        workers_nats = deployment.cluster.process("nats-0").spec.address
        async with relay_between(workers_nats, indexers_nats.url) as relay:
            yield deployment, relay


@asynccontextmanager
async def relay_between(from_url: str, to_url: str) -> AsyncIterator[UnreliableRelay]:
    async with connecting(from_url, "relay") as source, connecting(to_url, "relay") as sink:
        await until(lambda: source.is_connected and sink.is_connected)
        relay = UnreliableRelay(sink, seed=1)
        await source.subscribe(all_subjects(topology.NAMESPACE), cb=relay.take)
        yield relay


async def test_reordered_repeated_and_lost_events_leave_the_index_right(
    relayed: tuple[IndexDeployment, UnreliableRelay],
) -> None:
    deployment, relay = relayed
    relay.shuffled_together = 5
    async with deployment.under_load(seed=6):
        await until(lambda: relay.shuffled >= 10)
    await relay.flush()
    relay.shuffled_together = 1
    since = time.monotonic()
    positions = await deployment.positions()
    report(
        "events shuffled by fives and repeated",
        await deployment.until_right(positions, since, RIGHT_SECONDS),
    )
    # The last event of all is lost, and nothing follows but heartbeats.
    relay.is_losing_events = True
    await deployment.fill("decode_worker-0", 64, seed=7)
    await until(lambda: relay.lost)
    since = time.monotonic()
    positions = await deployment.positions()
    report("the last events lost", await deployment.until_right(positions, since, RIGHT_SECONDS))


async def test_the_command_finds_an_index_that_was_told_lies(
    relayed: tuple[IndexDeployment, UnreliableRelay],
) -> None:
    deployment, relay = relayed
    await deployment.fill("decode_worker-0", 64, seed=8)
    ((worker, position),) = (await right(deployment)).items()
    await relay.forge(worker, position, [0xBAD])
    await deployment.fill("decode_worker-0", 64, seed=9)
    with pytest.raises(NotRight):
        await right(deployment)
    status, out = await verify_command(deployment)
    assert status == verify.DIFFERENT, out
    for line in out.splitlines()[1:]:
        assert "only in index: 0000000000000bad" in line
        assert "only at worker: " in line
