"""Routing in a simulated deployment of real processes: what sticks, what is explained, what can be
changed while it runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest

from switchgear.common.v1 import generation_pb2
from switchgear.kv_indexer.v1 import kv_indexer_pb2, kv_indexer_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.running import LONG_PROMPT, Answer, Running, command, running
from tests.fixtures.eventually import eventually

PATIENT = ("--overlap-timeout-seconds", "10")
CACHE_FIRST = ("--decode-weight", "0.1", "--request-tokens", "0")
"""A conversation is not moved because its worker has one other request, or had one a moment ago."""
CONVERSATIONS = 48
TURNS = 4


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        flags={"router": PATIENT},
        sim_step_ms=1,
        prefill=1,
        decode=3,
    ) as it:
        yield it


async def index_follows(deployment: Running) -> None:
    """Returns when the index has as many blocks as the workers."""

    async def is_equal() -> bool:
        held = 0
        for process in deployment.cluster.processes():
            if "_worker-" in process.name:
                async with deployment.channel(process.name) as channel:
                    worker: worker_pb2_grpc.WorkerServiceAsyncStub = (
                        worker_pb2_grpc.WorkerServiceStub(channel)
                    )
                    held += (await worker.GetStatus(worker_pb2.GetStatusRequest())).cached_kv_blocks
        async with deployment.channel("kv_indexer-0") as channel:
            indexer: kv_indexer_pb2_grpc.KvIndexerServiceAsyncStub = (
                kv_indexer_pb2_grpc.KvIndexerServiceStub(channel)
            )
            status = await indexer.GetStatus(kv_indexer_pb2.GetStatusRequest())
        return sum(worker.blocks for worker in status.workers) == held

    await eventually(is_equal)


def growing(number: int) -> list[str]:
    """What a conversation sends: with each turn all that was said before, and something new."""
    first = f"Conversation {number}. " + LONG_PROMPT
    return [first + " And then this was said, too. " * 12 * turn for turn in range(TURNS)]


async def converse(deployment: Running, number: int) -> list[Answer]:
    """A conversation, each turn of which begins when the index knows the last one."""
    answers = []
    for text in growing(number):
        answers.append(await asyncio.to_thread(deployment.chat, text))
        await index_follows(deployment)
    return answers


async def test_a_conversation_sticks_to_its_worker_and_is_cached(deployment: Running) -> None:
    conversations = [await converse(deployment, number) for number in range(3)]
    for answers in conversations:
        # Its first prompt is mostly new, and may be prefilled elsewhere; what follows is not.
        assert len({answer.decode_worker for answer in answers}) == 1
        assert [answer.prefill_worker for answer in answers[1:]] == [None] * (TURNS - 1)
        assert all(answer.cached_tokens > 500 for answer in answers[1:])


async def test_a_conversation_sticks_without_kv_events_too(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    with running(
        tmp_path / "run",
        engine="sim",
        model=tokenizer_folder,
        flags={"router": PATIENT, "decode_worker": ("--no-kv-events",)},
        sim_step_ms=1,
        prefill=0,
        decode=3,
        indexers=0,
    ) as it:
        for number in range(6):
            home = f"decode_worker-{number % 3}"
            opening, *later = growing(number)
            first = await asyncio.to_thread(it.chat, opening, {"x-switchgear-pin": home})
            assert first.decode_worker == home
            for text in later:
                answer = await asyncio.to_thread(it.chat, text)
                assert answer.decode_worker == home
                assert answer.cached_tokens > 500
        # Nobody is missed where nobody is needed.
        assert it.metric("router-0", "switchgear_router_degraded", reason="no_kv_indexer") == 0
        explained = command(it, "explain").stdout
        predicted, reported = map(int, re.findall(r"predicted (\d+), reported (\d+)", explained)[0])
        assert predicted == reported > 500


def test_a_request_is_explained_by_its_id(deployment: Running) -> None:
    answer = deployment.chat("Explain this one. " + LONG_PROMPT)
    shown = command(deployment, "explain", answer.body["id"])
    assert shown.returncode == 0, shown.stderr
    assert answer.body["id"] in shown.stdout
    assert "by a prefill worker" in shown.stdout
    assert re.search(r"prefill: prefill_worker-0, lowest cost, policy kv", shown.stdout)
    assert re.search(rf"decode: {answer.decode_worker},[^*]* pulled [1-9]", shown.stdout)
    # Everyone who was considered, the winner with a star.
    assert len(set(re.findall(r"decode_worker-\d", shown.stdout))) == 3
    unknown = command(deployment, "explain", "chatcmpl-unknown")
    assert unknown.returncode == 1
    assert "chatcmpl-unknown" in unknown.stderr


def test_a_header_pins_a_request_to_a_worker(deployment: Running) -> None:
    for name in ("decode_worker-2", "decode_worker-1"):
        answer = deployment.chat("Pinned.", headers={"x-switchgear-pin": name})
        assert answer.decode_worker == name
    nobody = deployment.chat("Pinned.", headers={"x-switchgear-pin": "decode_worker-9"})
    assert nobody.status == 503
    assert "decode_worker-9" in nobody.body["error"]["message"]


def test_a_live_setting_changes_routing_and_a_bad_one_does_not(deployment: Running) -> None:
    assert deployment.chat("Before. " + LONG_PROMPT).prefill_worker is not None
    flags = ("router", "min_remote_prefill_tokens", "100000", "--model", deployment.model)
    done = command(deployment, "config", "set", *flags)
    assert (done.returncode, "in force" in done.stdout) == (0, True), done.stderr
    assert deployment.chat("Meanwhile. " + LONG_PROMPT).prefill_worker is None
    bad = command(deployment, "config", "set", *flags[:2], '"few"', *flags[3:])
    assert bad.returncode == 1
    assert "rejects" in bad.stderr
    assert deployment.chat("Still. " + LONG_PROMPT).prefill_worker is None
    assert "100000" in command(deployment, "config", "list").stdout
    undone = command(deployment, "config", "unset", *flags[:2], *flags[3:])
    assert undone.returncode == 0, undone.stderr
    assert deployment.chat("After. " + LONG_PROMPT).prefill_worker is not None


async def test_three_routers_find_as_much_cached_as_one(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    rates = {}
    for routers in (1, 3):
        # Timed like an engine: a worker's load must live longer than it takes to tell of it.
        run_dir = tmp_path / f"run{routers}"
        with running(
            run_dir,
            engine="sim",
            model=tokenizer_folder,
            flags={"router": (*PATIENT, *CACHE_FIRST)},
            prefill=0,
            decode=4,
            routers=routers,
        ) as it:
            rates[routers] = await hit_rate(it, routers)
            print(f"{routers} routers: {rates[routers]:.4f} of the prompt tokens were cached")
    assert rates[1] > 0.5
    assert rates[3] >= rates[1] - 0.02


async def hit_rate(deployment: Running, routers: int) -> float:
    """Cached share of the prompt tokens of conversations of four kinds, which go on side by side
    and whose requests go to the routers in turn.

    A turn begins when the index knows the last one, so that a slow machine changes nothing. The
    first one is not counted: how often what a kind has in common is computed is a matter of luck.
    """
    names = [f"router-{number}" for number in range(routers)]

    def counted() -> tuple[float, float]:
        """Prompt tokens so far, and those of them that engines found cached."""
        prompt = [deployment.metric(n, "switchgear_router_prompt_tokens_total") for n in names]
        name = "switchgear_router_cached_tokens_total"
        return sum(prompt), sum(deployment.metric(n, name, by="reported") for n in names)

    random = Random(7)
    kinds = [random.choices(range(1000, 40_000), k=512) for _ in range(4)]
    prompts = [kinds[number % 4] + [2000 + number] * 256 for number in range(CONVERSATIONS)]
    a_few = asyncio.Semaphore(3)
    async with AsyncExitStack() as stack:
        stubs: list[router_pb2_grpc.RouterServiceAsyncStub] = []
        for number in range(routers):
            channel = await stack.enter_async_context(deployment.channel(f"router-{number}"))
            stubs.append(router_pb2_grpc.RouterServiceStub(channel))

        async def serve(number: int, turn: int) -> None:
            prompt = prompts[number]
            prompts[number] = prompt + [3000 + turn] * 128
            generation = generation_pb2.Generation(
                request_id=f"{number}-{turn}",
                model=deployment.model,
                token_ids=prompt,
                stopping=generation_pb2.StoppingOptions(max_tokens=16),
            )
            request = router_pb2.GenerateRequest(generation=generation)
            async with a_few:
                stub = stubs[(number + turn) % routers]  # Never the same for long.
                assert [response async for response in stub.Generate(request, timeout=60)]

        for turn in range(TURNS):
            order = random.sample(range(CONVERSATIONS), CONVERSATIONS)
            await asyncio.gather(*(serve(number, turn) for number in order))
            await index_follows(deployment)
            if turn == 0:
                prompt_before, cached_before = await asyncio.to_thread(counted)
        prompt, cached = await asyncio.to_thread(counted)
    return (cached - cached_before) / (prompt - prompt_before)
