"""A request that no decode worker has room for, as somebody on call sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.pictures.collector import Collector, collecting
from tests.e2e.running import LONG_PROMPT, Running, command, running, stream
from tests.fixtures.eventually import until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
LONG_ANSWER_TOKENS = 250


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as it:
        yield it


@pytest.fixture
def deployment(tmp_path: Path, tokenizer_folder: Path, collector: Collector) -> Iterator[Running]:
    endpoint = ("--otlp-endpoint", collector.endpoint)
    # Room for one of the prompts and its answer, and for no other one beside it.
    room = ("--sim-kv-tokens", "1024", "--sim-timing", "fixed", "--sim-step-ms", "20")
    with running(
        tmp_path,
        engine="sim",
        model=tokenizer_folder,
        flags={
            "frontend": endpoint,
            "router": (*endpoint, "--overlap-timeout-seconds", "10"),
            "decode_worker": room,
        },
        prefill=0,
    ) as it:
        yield it


def body(deployment: Running, opening: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": deployment.model,
        "messages": [{"role": "user", "content": f"{opening}. {LONG_PROMPT}"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }


async def test_a_held_request_is_in_the_metrics_the_log_its_explanation_and_its_trace(
    deployment: Running, collector: Collector
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60) as client:
        running_one = stream(client, body(deployment, "First", LONG_ANSWER_TOKENS))
        await anext(running_one)
        held = asyncio.create_task(
            client.post("/v1/chat/completions", json=body(deployment, "Second", 1), headers=headers)
        )
        await until(lambda: deployment.metric("router-0", "switchgear_router_held_requests") == 1)
        meanwhile = await asyncio.to_thread(command, deployment, "explain", "--last", "1")
        assert "for room at a decode worker, and it still is" in meanwhile.stdout
        async for _ in running_one:
            pass
        answer = await held
    assert answer.status_code == 200
    explained = command(deployment, "explain", answer.json()["id"])
    assert (
        "s for room at a decode worker, until there was room; decode_worker-0" in explained.stdout
    )
    held_seconds = "switchgear_router_held_seconds"
    assert deployment.metric("router-0", f"{held_seconds}_count", outcome="sent") == 1
    seconds = deployment.metric("router-0", f"{held_seconds}_sum", outcome="sent")

    await until(lambda: "route" in {span.name for span in collector.trace(TRACE_ID)})
    spans = {span.name: span for span in collector.trace(TRACE_ID)}
    span = spans["held"]
    assert (span.service, span.parent_id) == ("router", spans["route"].span_id)
    assert span.attributes["switchgear.nearest_worker"] == "decode_worker-0"
    assert span.ended_at_ns > span.began_at_ns

    def told() -> list[dict[str, Any]]:
        lines = deployment.cluster.log_path("router-0").read_text().splitlines()
        return [json.loads(line) for line in lines if "room" in line]

    await until(lambda: len(told()) == 2)
    begin, over = told()
    assert (begin["event"], begin["nearest_worker"]) == ("no room at any worker", "decode_worker-0")
    assert (over["event"], over["outcomes"]) == ("room again", {"sent": 1})
    assert over["longest_seconds"] == pytest.approx(seconds, abs=0.001)
