"""`python -m services.kv_indexer verify`: is the index right? A table, and an exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from libs.common.channels import Channels
from libs.common.config import ConfigError
from libs.common.discovery import Discovery
from libs.common.errors import CredentialsRefused, NoLiveInstance
from libs.common.kv_events import Tier
from services.kv_indexer.config import KvIndexerSettings
from switchgear.discovery.v1 import discovery_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc

EQUAL, DIFFERENT, NOT_COMPARED = 0, 1, 2
"""Exit statuses; the largest of all comparisons is the command's."""

UNTOLD_SECONDS = 1.0
"""How long a person is left without a word on what is waited for."""

HEADINGS = (
    *("indexer", "worker", "model", "tier", "equal", "only in index", "only at worker"),
    *("evicted", "behind", ""),
)
_NUMBERS = range(4, 9)

_Blocks = kv_indexer_pb2.Comparison | kv_indexer_pb2.TierComparison


@dataclass(frozen=True, slots=True)
class Answer:
    """What one indexer said."""

    indexer: str
    comparisons: Sequence[kv_indexer_pb2.Comparison]
    failure: str = ""
    """Why it said nothing."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    settings = KvIndexerSettings()
    parser = argparse.ArgumentParser(
        prog="python -m services.kv_indexer verify",
        description="Compares the blocks in each KV indexer with those at the workers. Exits with"
        f" {EQUAL} when they are equal, {DIFFERENT} when they are not, {NOT_COMPARED} when it can't"
        " be told. Blocks that the index evicted for want of room are no difference, nor are"
        " batches that are just on their way.",
    )
    parser.add_argument(
        "--etcd-url",
        default=settings.etcd_url,
        help="further settings, such as certificates, are those of the KV indexer and come from the"
        " environment",
    )
    parser.add_argument("--namespace", default=settings.namespace)
    parser.add_argument("--timeout-seconds", type=float, default=30.0, help="for all answers")
    arguments = parser.parse_args(argv)
    try:
        settings.check_files()
        discovery = Discovery(arguments.etcd_url, arguments.namespace, settings.etcd_access)
        channels = Channels(settings.certificates)
        answers, names = asyncio.run(
            _ask_all(discovery, arguments.etcd_url, channels, arguments.timeout_seconds)
        )
    except (ConfigError, CredentialsRefused, NoLiveInstance) as error:
        print(error, file=sys.stderr)
        return NOT_COMPARED
    if not answers:
        print(f"no KV indexer is registered in namespace {arguments.namespace}", file=sys.stderr)
        return NOT_COMPARED
    print(table(answers, names))
    return max(map(verdict, answers))


async def _ask_all(
    discovery: Discovery, etcd_url: str, channels: Channels, timeout_seconds: float
) -> tuple[list[Answer], dict[int, str]]:
    """All indexers' answers, and the names of the instances. Raises NoLiveInstance without etcd,
    and CredentialsRefused."""
    with _told(f"waiting for etcd at {etcd_url}"):
        instances = (await discovery.read("instances/", discovery_pb2.Instance)).values()
    names = {instance.instance_id: instance.name for instance in instances}
    # One that was killed and started again is listed twice until the first one's lease ends.
    indexers = {
        instance.address: instance.name
        for instance in sorted(instances, key=lambda instance: instance.name)
        if instance.role == discovery_pb2.ROLE_KV_INDEXER
    }
    asked = (ask(name, address, timeout_seconds, channels) for address, name in indexers.items())
    with _told(f"waiting for {', '.join(indexers.values())}"):
        return list(await asyncio.gather(*asked)), names


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Says so, unless the body is quick."""
    told = asyncio.get_running_loop().call_later(
        UNTOLD_SECONDS, lambda: print(what, file=sys.stderr, flush=True)
    )
    try:
        yield
    finally:
        told.cancel()


async def ask(
    name: str, address: str, timeout_seconds: float, channels: Channels | None = None
) -> Answer:
    """One indexer's comparison with all of its workers."""
    async with (channels or Channels()).open(address, "kv_indexer") as channel:
        stub = kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
        try:
            response = await stub.Verify(kv_indexer_pb2.VerifyRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            return Answer(name, (), f"{error.code().name} from {address}: {error.details()}")
    return Answer(name, response.comparisons)


def verdict(answer: Answer) -> int:
    """EQUAL, DIFFERENT or NOT_COMPARED."""
    if answer.failure:
        return NOT_COMPARED
    return max(map(_verdict_of, answer.comparisons), default=EQUAL)


def _verdict_of(comparison: kv_indexer_pb2.Comparison) -> int:
    if comparison.failure:
        return NOT_COMPARED
    tiers: list[_Blocks] = [comparison, *comparison.lower_tiers]
    is_different = any(it.only_in_index_blocks or it.only_at_worker_blocks for it in tiers)
    return DIFFERENT if is_different else EQUAL


def table(answers: Iterable[Answer], names: Mapping[int, str]) -> str:
    """One line for each indexer, worker and tier; blocks, and batches that the index is behind."""
    rows: list[Sequence[str]] = [HEADINGS]
    for answer in answers:
        if answer.failure or not answer.comparisons:
            rows.append((answer.indexer, *("-",) * 8, answer.failure or "follows no worker"))
        for comparison in answer.comparisons:
            instance = comparison.instance_id
            worker = names.get(instance) or f"{instance:016x}"
            rows += ((answer.indexer, worker, *cells) for cells in _cells(comparison))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if position in _NUMBERS else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cells(comparison: kv_indexer_pb2.Comparison) -> Iterator[tuple[str, ...]]:
    model = comparison.model or "-"
    if comparison.failure:
        yield (model, *("-",) * 6, comparison.failure)
        return
    behind = comparison.worker_sequence_number - comparison.index_sequence_number
    tiers: list[tuple[Tier, _Blocks]] = [
        (Tier.DEVICE, comparison),
        *((Tier(it.tier), it) for it in comparison.lower_tiers),
    ]
    for tier, blocks in tiers:
        yield (
            model,
            tier.name.lower(),
            str(blocks.equal_blocks),
            str(blocks.only_in_index_blocks),
            str(blocks.only_at_worker_blocks),
            str(blocks.evicted_blocks),
            str(behind),
            _examples(blocks) or "equal",
        )


def _examples(comparison: _Blocks) -> str:
    """Some of the blocks that differ; empty when none does."""
    return "; ".join(
        f"{where}: {' '.join(f'{block:016x}' for block in blocks)}"
        for where, blocks in (
            ("only in index", comparison.only_in_index_examples[:2]),
            ("only at worker", comparison.only_at_worker_examples[:2]),
        )
        if blocks
    )
