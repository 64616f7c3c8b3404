"""What a deployment of real processes tells of itself: traces, log lines, metrics."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.pictures.collector import Collector, ReceivedSpan, collecting
from tests.e2e.running import LONG_PROMPT, Running, running, stream, text_of
from tests.fixtures.eventually import until
from tests.fixtures.metrics_table import SERVICES, documented_labels, documented_metrics

CALLER = "b7ad6b7169203331"

FOLLOWED = {
    ("frontend", "chat test-model", "SERVER"),
    ("frontend", "tokenise", "INTERNAL"),
    ("frontend", "attempt", "CLIENT"),
    ("router", "route", "SERVER"),
    ("router", "find overlaps", "CLIENT"),
    ("kv_indexer", "find overlap", "SERVER"),
    ("router", "decide", "INTERNAL"),
    ("router", "prefill leg", "CLIENT"),
    ("prefill_worker", "prefill", "SERVER"),
    ("prefill_worker", "queue", "INTERNAL"),
    ("prefill_worker", "first token", "INTERNAL"),
    ("router", "decode leg", "CLIENT"),
    ("decode_worker", "decode", "SERVER"),
    ("decode_worker", "queue", "INTERNAL"),
    ("decode_worker", "kv transfer", "INTERNAL"),
    ("decode_worker", "first token", "INTERNAL"),
    ("decode_worker", "generate", "INTERNAL"),
}
PARENTS = {
    "tokenise": "chat test-model",
    "attempt": "chat test-model",
    "route": "attempt",
    "find overlaps": "route",
    "find overlap": "find overlaps",
    "decide": "route",
    "prefill leg": "route",
    "decode leg": "route",
    "prefill": "prefill leg",
    "decode": "decode leg",
    "kv transfer": "decode",
    "generate": "decode",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as it:
        yield it


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, collector: Collector
) -> Iterator[Running]:
    endpoint = ("--otlp-endpoint", collector.endpoint)
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        flags={
            "frontend": (*endpoint, "--trace-sample-ratio", "1"),
            "router": (*endpoint, "--overlap-timeout-seconds", "10"),
            "kv_indexer": endpoint,
            "prefill_worker": endpoint,
            "decode_worker": (*endpoint, "--sim-timing", "fixed", "--sim-step-ms", "10"),
        },
        prefill=1,
        decode=2,
        routers=1,
        frontends=1,
        indexers=1,
    ) as it:
        yield it


def traceparent(trace_id: str, flags: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{CALLER}-{flags}"}


def names(spans: list[ReceivedSpan]) -> set[tuple[str, str, str]]:
    return {(span.service, span.name, span.kind) for span in spans}


async def test_a_disaggregated_request_is_one_trace_rightly_nested_and_in_order(
    deployment: Running, collector: Collector
) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    answer = deployment.chat("Trace. " + LONG_PROMPT, headers=traceparent(trace_id, "01"))
    assert answer.status == 200
    await until(lambda: names(collector.trace(trace_id)) >= FOLLOWED)
    spans = collector.trace(trace_id)
    decided = sorted(
        (each for each in spans if each.name == "decide"), key=lambda it: it.began_at_ns
    )
    assert len(decided) == 2
    assert len(spans) == len(FOLLOWED) + 1

    by_id = {span.span_id: span for span in spans}
    by_name = {span.name: span for span in spans}
    by_name["decide"], by_name["decide again"] = decided
    root = by_name["chat test-model"]
    assert root.parent_id == CALLER
    for span in spans:
        if span is root:
            continue
        parent = by_id[span.parent_id]
        assert parent.name == PARENTS.get(span.name, parent.name)
        assert parent.began_at_ns <= span.began_at_ns <= span.ended_at_ns <= parent.ended_at_ns
        assert not span.is_error
    # One thing after another, within each process and from one to the next.
    order = [
        "tokenise",
        "find overlaps",
        "decide",
        "prefill leg",
        "decide again",
        "decode leg",
        "kv transfer",
        "generate",
    ]
    for former, latter in pairwise(order):
        if latter == "kv transfer":  # Within the decode leg.
            assert by_name[former].began_at_ns <= by_name[latter].began_at_ns
        else:
            assert by_name[former].ended_at_ns <= by_name[latter].began_at_ns

    usage = answer.body["usage"]
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["gen_ai.request.model"] == "test-model"
    assert root.attributes["gen_ai.response.id"] == answer.body["id"]
    assert root.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert root.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert root.attributes["switchgear.prefill_worker"] == "prefill_worker-0"
    took_seconds = (root.ended_at_ns - root.began_at_ns) / 1e9
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] < took_seconds
    assert by_name["decode"].attributes["switchgear.transferred_tokens"] > 0
    assert by_name["decide"].attributes["switchgear.handover"] == "remote"
    assert by_name["decide again"].attributes["switchgear.handover"] == "computed"
    assert by_name["find overlap"].attributes["switchgear.sequence_hashes"] > 30


async def test_what_an_indexer_asks_workers_for_is_a_trace_of_its_own(
    deployment: Running, collector: Collector
) -> None:
    deployment.cluster.restart("kv_indexer-0", 60)

    def recoveries() -> list[ReceivedSpan]:
        return [span for span in collector.spans if span.name == "recover"]

    # It was started again, so it asks all workers for what they hold.
    await until(
        lambda: len({span.attributes["switchgear.instance_id"] for span in recoveries()}) == 3
    )
    for recovery in recoveries():
        assert (recovery.service, recovery.kind, recovery.parent_id) == (
            "kv_indexer",
            "INTERNAL",
            "",
        )


async def test_a_trace_begun_here_has_the_number_of_its_request(
    deployment: Running, collector: Collector
) -> None:
    answer = deployment.chat("Hello.")
    trace_id = str(answer.body["id"]).removeprefix("chatcmpl-")
    await until(lambda: "generate" in {span.name for span in collector.trace(trace_id)})
    await until(lambda: "chat test-model" in {span.name for span in collector.trace(trace_id)})
    [root] = [span for span in collector.trace(trace_id) if not span.parent_id]
    assert (root.service, root.name) == ("frontend", "chat test-model")


async def test_a_caller_who_does_not_sample_is_not_traced(
    deployment: Running, collector: Collector
) -> None:
    trace_id = "1af7651916cd43dd8448eb211c80319c"
    assert deployment.chat("Hello.", headers=traceparent(trace_id, "00")).status == 200
    later = str(deployment.chat("Hello again.").body["id"]).removeprefix("chatcmpl-")
    await until(lambda: "chat test-model" in {span.name for span in collector.trace(later)})
    assert collector.trace(trace_id) == []


def exposed(deployment: Running, service: str) -> str:
    if service == "frontend":
        url = deployment.url
    else:
        url = f"http://127.0.0.1:{deployment.cluster.process(f'{service}-0').spec.ports['metrics']}"
    return httpx.get(f"{url}/metrics", timeout=10).text


def ours(text: str) -> dict[str, str]:
    """Names and types of our metrics, as exposed. Counters also have the time of their making,
    which is a gauge."""
    lines = [
        line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE switchgear_")
    ]
    return {name: kind for name, kind in lines if not name.endswith("_created")}


@pytest.mark.parametrize("service", SERVICES)
def test_the_table_of_metrics_is_what_a_service_exposes(deployment: Running, service: str) -> None:
    deployment.chat("Metrics. " + LONG_PROMPT)
    text = exposed(deployment, service)
    table = {name: row for name, row in documented_metrics().items() if service in row.services}
    assert ours(text) == {name: row.type for name, row in table.items()}
    for family in text_string_to_metric_families(text):
        row = table.get(family.name) or table.get(f"{family.name}_total")
        for sample in family.samples:
            if row is not None and not sample.name.endswith("_created"):
                assert sample.labels.keys() - {"le"} == row.labels, sample.name


def test_every_label_has_known_values() -> None:
    used = {label for row in documented_metrics().values() for label in row.labels}
    assert used == documented_labels()


def test_no_client_can_make_series_without_end(deployment: Running) -> None:
    def misbehave(number: int) -> None:
        name = f"nobody-{number}"
        body = {"model": name, "messages": [{"role": "user", "content": name}]}
        with httpx.Client(base_url=deployment.url, timeout=30) as client:
            client.post("/v1/chat/completions", json=body, headers={"x-request-id": name})
            client.post("/v1/chat/completions", json={"model": deployment.model, name: name})
            client.get(f"/v1/models/{name}")
            client.get(f"/{name}")
            client.request(f"NO{number}", "/v1/models")

    def series() -> int:
        return sum(
            line.startswith("switchgear_")
            for service in ("frontend", "router")
            for line in exposed(deployment, service).splitlines()
        )

    misbehave(0)
    before = series()
    for number in range(1, 6):
        misbehave(number)
    assert series() == before


async def test_a_migrated_request_is_one_trace_with_two_attempts_and_its_ids_are_in_the_logs(
    deployment: Running, collector: Collector
) -> None:
    trace_id = "2af7651916cd43dd8448eb211c80319c"
    body: dict[str, object] = {
        "model": deployment.model,
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": 150,
    }
    request_id, is_killed = "", False
    headers = traceparent(trace_id, "01")
    async with httpx.AsyncClient(base_url=deployment.url, timeout=60, headers=headers) as client:
        async for event in stream(client, body):
            request_id = event["id"]
            if text_of(event) and not is_killed:
                is_killed = True
                deployment.cluster.kill(_decoding(deployment), signal.SIGKILL)
    await until(lambda: "chat test-model" in {span.name for span in collector.trace(trace_id)})
    spans = collector.trace(trace_id)
    lost, good = [span for span in spans if span.name == "attempt"]
    assert (lost.is_error, lost.attributes["error.type"]) == (True, "WORKER_LOST")
    assert not good.is_error
    [line] = [
        json.loads(line)
        for line in deployment.cluster.log_path("frontend-0").read_text().splitlines()
        if "request migrates" in line
    ]
    assert (line["request_id"], line["trace_id"]) == (request_id, trace_id)


def _decoding(deployment: Running) -> str:
    """The decode worker that has something to do."""
    for name in ("decode_worker-0", "decode_worker-1"):
        if deployment.metric(name, "switchgear_worker_running_requests"):
            return name
    raise AssertionError("nobody decodes")
