"""A real deployment: vLLM engines, a real model in float32, KV pulled over NIXL (UCX, TCP)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import psutil
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer

from deploy.local import default_model, topology
from switchgear.common.v1 import generation_pb2
from switchgear.decode_worker.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from switchgear.prefill_worker.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc
from switchgear.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.running import LONG_PROMPT, Running, running
from tests.fixtures.eventually import eventually, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK_TOKENS = 32
# SmolLM2-135M: 30 layers, 3 KV heads of 64, key and value, 4 bytes each.
KV_BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4
PREFILL_WORKERS = ("prefill_worker-0", "prefill_worker-1")
DECODE_WORKER = "decode_worker-0"
ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as environment:
        # Shared memory would work on a stopped process; a network does not.
        environment.setenv("UCX_TLS", "tcp,self")
        with running(
            tmp_path_factory.mktemp("run"),
            engine="vllm",
            model=default_model.model_folder(print),
            flags={
                "router": ("--min-remote-prefill-tokens", "64"),
                "prefill_worker": ("--transfer-timeout-seconds", "4"),
                "decode_worker": ("--transfer-timeout-seconds", "4"),
            },
            ready_seconds=240,
            prefill=2,
            decode=1,
        ) as it:
            yield it


async def restart(deployment: Running, name: str) -> None:
    await asyncio.to_thread(deployment.cluster.restart, name, 240)


def generation(
    deployment: Running, prompt: list[int], *, salt: str = "", max_tokens: int = ANSWER_TOKENS
) -> generation_pb2.Generation:
    return generation_pb2.Generation(
        request_id="test",
        model=deployment.model,
        token_ids=prompt,
        sampling=generation_pb2.SamplingOptions(temperature=0),
        stopping=generation_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=True),
        kv=generation_pb2.KvOptions(cache_salt=salt),
    )


async def disaggregated(
    deployment: Running, prompt: list[int]
) -> tuple[list[int], router_pb2.Routed]:
    """By way of the router."""
    async with deployment.channel("router-0") as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(generation=generation(deployment, prompt))
        responses = [response async for response in stub.Generate(request, timeout=120)]
    return [token for r in responses for token in r.token_ids], responses[0].routed


async def aggregated(deployment: Running, prompt: list[int]) -> list[int]:
    """By the decode worker alone, under a salt of its own, so that it has nothing cached."""
    async with deployment.channel(DECODE_WORKER) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(channel)
        )
        request = decode_worker_pb2.GenerateRequest(
            generation=generation(deployment, prompt, salt="alone")
        )
        responses = [response async for response in stub.Generate(request, timeout=120)]
    assert responses[0].cached_tokens == responses[0].transferred_tokens == 0
    return [token for r in responses for token in r.token_ids]


def plain_vllm(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """By vLLM itself, in a process of its own."""
    task = {"model": str(model), "prompts": prompts, "max_tokens": ANSWER_TOKENS}
    result = subprocess.run(
        [topology.REPOSITORY / ".venv-vllm/bin/python", Path(__file__).with_name("plain_vllm.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    outputs: list[list[int]] = json.loads(result.stdout.splitlines()[-1])
    return outputs


async def test_disaggregated_aggregated_and_plain_vllm_agree_token_for_token(
    deployment: Running,
) -> None:
    folder = default_model.model_folder(print)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [
        "Once upon a time, in a small village by the sea, " * 8,
        "def fibonacci(n):\n    if n < 2:\n        return n\n" * 10,
        "The history of the steam engine begins in the first century. " * 12,
        LONG_PROMPT,
    ]
    prompts = [tokenizer.encode(text).ids for text in texts]
    pulled = []
    for prompt in prompts:
        tokens, routed = await disaggregated(deployment, prompt)
        assert routed.prefill_worker.name in PREFILL_WORKERS
        pulled.append(tokens)
    whole = [await aggregated(deployment, prompt) for prompt in prompts]
    plain = await asyncio.to_thread(plain_vllm, folder, prompts)
    assert [len(tokens) for tokens in plain] == [ANSWER_TOKENS] * len(prompts)
    assert whole == plain
    assert pulled == plain


async def test_the_official_client_gets_sensible_english(deployment: Running) -> None:
    question: list[dict[str, str]] = [{"role": "user", "content": "What is the capital of France?"}]
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(
            model=deployment.model,
            messages=question,  # type: ignore[arg-type]
            max_tokens=20,
            temperature=0,
        )
        chunks = await client.chat.completions.create(
            model=deployment.model,
            messages=question,  # type: ignore[arg-type]
            max_tokens=20,
            temperature=0,
            stream=True,
        )
        text = ""
        async for chunk in chunks:  # type: ignore[union-attr]
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    answer = whole.choices[0]
    assert "Paris" in (answer.message.content or "")
    assert answer.finish_reason == "stop"
    assert text == answer.message.content


def test_chat_responses_and_messages_say_the_same(deployment: Running) -> None:
    question = "What is the capital of France?"
    chat = deployment.chat(question, max_tokens=20, temperature=0).text
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        response = client.responses.create(
            model=deployment.model, input=question, max_output_tokens=20, temperature=0
        )
        events = client.responses.create(
            model=deployment.model,
            input=question,
            max_output_tokens=20,
            temperature=0,
            stream=True,
        )
        streamed = [event.delta for event in events if event.type == "response.output_text.delta"]
    with anthropic.Anthropic(base_url=deployment.url, api_key="none") as anthropic_client:
        message = anthropic_client.messages.create(
            model=deployment.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=20,
            extra_body={"temperature": 0},
        )
    [block] = message.content
    assert block.type == "text"
    assert "Paris" in chat
    assert [response.output_text, "".join(streamed), block.text] == [chat] * 3


class City(BaseModel):
    name: Literal["Paris", "London"]
    inhabitants: int


def test_a_response_is_parsed_into_a_class(deployment: Running) -> None:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        response = client.responses.parse(
            model=deployment.model,
            input="Describe a city in JSON.",
            text_format=City,
            max_output_tokens=60,
        )
    assert response.output_parsed is not None
    assert response.output_parsed.name in ("Paris", "London")


async def test_log_probabilities_of_an_answer_are_those_of_the_same_text_as_a_prompt(
    deployment: Running,
) -> None:
    prompt = "The history of the steam engine begins"
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        answer = await client.completions.create(
            model=deployment.model, prompt=prompt, max_tokens=8, temperature=0, logprobs=2
        )
        drawn = answer.choices[0].logprobs
        assert drawn is not None
        assert drawn.tokens is not None
        assert drawn.token_logprobs is not None
        assert drawn.top_logprobs is not None
        assert "".join(drawn.tokens) == answer.choices[0].text
        # Greedily, each token is the likeliest.
        for logprob, alternatives in zip(drawn.token_logprobs, drawn.top_logprobs, strict=True):
            assert logprob == max(alternatives.values())
            assert len(alternatives) == 2
        scored = await client.completions.create(
            model=deployment.model,
            prompt=prompt + answer.choices[0].text,
            max_tokens=1,
            echo=True,
            logprobs=2,
        )
    echoed = scored.choices[0].logprobs
    assert echoed is not None
    assert echoed.tokens is not None
    assert echoed.token_logprobs is not None
    assert echoed.tokens[-9:-1] == drawn.tokens
    assert echoed.token_logprobs[-9:-1] == pytest.approx(drawn.token_logprobs, abs=1e-3)
    assert repr(echoed.token_logprobs[0]) == "None"  # Which the client's types do not know.


def test_choices_differ_and_equal_seeds_give_equal_answers(deployment: Running) -> None:
    def ask(**options: Any) -> list[str]:
        answer = deployment.chat("Tell me a story.", temperature=1, max_tokens=12, **options)
        assert answer.status == 200, answer.body
        return [choice["message"]["content"] for choice in answer.body["choices"]]

    three = ask(n=3, seed=7)
    assert len(set(three)) == 3
    assert ask(n=3, seed=7) == three
    assert ask(seed=7) == three[:1]
    assert ask(seed=8) != three[:1]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Paris", "London"]},
        "inhabitants": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("is_disaggregated", [False, True])
def test_an_answer_follows_a_json_schema(deployment: Running, is_disaggregated: bool) -> None:
    prompt = (LONG_PROMPT if is_disaggregated else "") + "Describe a city in JSON."
    answer = deployment.chat(
        prompt,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "strict": True, "schema": SCHEMA},
        },
    )
    assert (answer.prefill_worker is not None) == is_disaggregated
    city = json.loads(answer.text)
    assert city["name"] in ("Paris", "London")
    assert 1 <= city["inhabitants"] <= 99
    assert set(city) == {"name", "inhabitants"}


@pytest.mark.parametrize(
    ("option", "expression"),
    [
        ({"guided_regex": "[A-Z]{3}-[0-9]{4}"}, "[A-Z]{3}-[0-9]{4}"),
        ({"structured_outputs": {"choice": ["crimson", "azure"]}}, "crimson|azure"),
        ({"guided_grammar": 'root ::= "<" [a-c]+ ">"'}, "<[a-c]+>"),
        ({"logit_bias": {"28": 100}, "max_tokens": 3}, r"(.+)\1\1"),
    ],
)
def test_an_answer_follows_what_it_is_held_to(
    deployment: Running, option: dict[str, Any], expression: str
) -> None:
    answer = deployment.chat("Say something.", **{"max_tokens": 30, **option})
    assert answer.status == 200, answer.body
    assert re.fullmatch(expression, answer.text)


def test_a_schema_that_can_not_be_followed_is_refused_by_name(deployment: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    answer = deployment.chat("Hi", structured_outputs={"json": schema})
    assert answer.status == 400
    assert answer.body["error"]["param"] == "structured_outputs"


async def test_a_frequency_penalty_keeps_an_answer_from_repeating_itself(
    deployment: Running,
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:

        async def distinct_tokens(frequency_penalty: float) -> int:
            answer = await client.completions.create(
                model=deployment.model,
                prompt="1, 1, 1, 1, 1,",
                max_tokens=20,
                temperature=0,
                logprobs=0,
                frequency_penalty=frequency_penalty,
            )
            assert answer.choices[0].logprobs is not None
            return len(set(answer.choices[0].logprobs.tokens or ()))

        assert await distinct_tokens(0) == 3
        assert await distinct_tokens(1.5) > 8


@pytest.mark.parametrize(
    "sampling",
    [
        generation_pb2.SamplingOptions(
            temperature=0,
            constraint=generation_pb2.OutputConstraint(regex="(one|two|three) [0-9]{12} ok"),
        ),
        generation_pb2.SamplingOptions(temperature=0, frequency_penalty=1.5),
    ],
    ids=["constraint", "frequency penalty"],
)
async def test_a_migrated_request_goes_on_as_if_it_had_not_been(
    deployment: Running, sampling: generation_pb2.SamplingOptions
) -> None:
    async def run(prompt: list[int], produced: list[int], told: int) -> list[int]:
        request = generation(deployment, prompt + produced, max_tokens=20 - len(produced))
        request.sampling.CopyFrom(sampling)
        request.produced_tokens = told
        request.stopping.ignore_eos = False
        async with deployment.channel("router-0") as channel:
            stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(
                channel
            )
            call = stub.Generate(router_pb2.GenerateRequest(generation=request), timeout=120)
            return [token async for response in call for token in response.token_ids]

    folder = default_model.model_folder(print)
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("1, 1, 1, 1, 1,").ids
    whole = await run(prompt, [], 0)
    for count in (1, 7):
        produced = whole[:count]
        assert produced + await run(prompt, produced, count) == whole
        assert produced + await run(prompt, produced, 0) != whole


def test_nixl_moves_what_the_prompts_kv_weighs_and_vllm_calls_it_external(
    deployment: Running,
) -> None:
    def read() -> tuple[float, float, float, float]:
        def metric(name: str, **labels: str) -> float:
            return deployment.metric(DECODE_WORKER, name, **labels)

        source = "vllm:prompt_tokens_by_source_total"
        return (
            metric("switchgear_worker_kv_transfer_bytes_total"),
            metric("switchgear_worker_kv_transfer_blocks_total"),
            metric(source, source="external_kv_transfer"),
            metric(source, source="local_compute"),
        )

    before = read()
    answer = deployment.chat("What does the fox do? " + LONG_PROMPT)
    assert answer.prefill_worker in PREFILL_WORKERS
    prompt_tokens = answer.body["usage"]["prompt_tokens"]
    prompt_blocks = -(-prompt_tokens // BLOCK_TOKENS)
    # vLLM reports what moved some steps later.
    answered = read()
    for _ in range(100):
        if answered[1] > before[1]:
            break
        deployment.chat("Hi.")
        answered = read()
    moved_bytes, moved_blocks = answered[0] - before[0], answered[1] - before[1]
    # The first block is the template's, which the decode worker has of its own.
    assert prompt_blocks - 2 <= moved_blocks <= prompt_blocks
    assert moved_bytes == moved_blocks * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
    external = answered[2] - before[2]
    assert prompt_tokens - 2 * BLOCK_TOKENS <= external <= prompt_tokens


def test_a_prompt_that_continues_another_goes_to_the_prefill_worker_that_has_it(
    deployment: Running,
) -> None:
    prompt = "A tale of two workers. " + LONG_PROMPT
    first = deployment.chat(prompt)
    assert first.prefill_worker in PREFILL_WORKERS
    for ending in ("And then what happened? ", "Then the dog woke up. "):
        longer = deployment.chat(prompt + ending * 50)
        assert longer.prefill_worker == first.prefill_worker
        assert longer.cached_tokens >= 500
    again = deployment.chat(prompt)
    assert again.cached_tokens >= 500
    assert again.text == first.text


async def test_a_client_that_leaves_frees_the_engine(deployment: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model=deployment.model,
            messages=[{"role": "user", "content": "Count to a thousand."}],
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await stream.close()

    async def is_idle() -> bool:
        async with deployment.channel(DECODE_WORKER) as channel:
            stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(
                channel
            )
            return not (await stub.GetStatus(worker_pb2.GetStatusRequest())).request_ids

    await eventually(is_idle)


async def test_a_pull_from_a_stalled_engine_is_given_up_and_the_prompt_computed(
    deployment: Running,
) -> None:
    # They have met: only a pull without a handshake is left to stall.
    met = await asyncio.to_thread(deployment.chat, "We have met. " + LONG_PROMPT)
    assert met.prefill_worker is not None
    prompt = [token % 40_000 + 100 for token in range(7, 7 * 300, 7)]
    async with (
        deployment.channel(met.prefill_worker) as to_prefill,
        deployment.channel(DECODE_WORKER) as to_decode,
    ):
        prefill: prefill_worker_pb2_grpc.PrefillWorkerServiceAsyncStub = (
            prefill_worker_pb2_grpc.PrefillWorkerServiceStub(to_prefill)
        )
        decode: decode_worker_pb2_grpc.DecodeWorkerServiceAsyncStub = (
            decode_worker_pb2_grpc.DecodeWorkerServiceStub(to_decode)
        )
        request = generation(deployment, prompt)
        computed = await prefill.Prefill(
            prefill_worker_pb2.PrefillRequest(generation=request), timeout=60
        )
        pid = deployment.cluster.process(met.prefill_worker).pid
        engines = psutil.Process(pid).children(recursive=True)
        assert engines
        for engine in engines:
            engine.suspend()
        try:
            call = decode.Generate(
                decode_worker_pb2.GenerateRequest(
                    generation=request, kv_session=computed.kv_session
                ),
                timeout=60,
            )
            responses = [response async for response in call]
        finally:
            for engine in engines:
                engine.resume()
    assert responses[0].transferred_tokens == 0
    assert sum(len(response.token_ids) for response in responses) == ANSWER_TOKENS


async def test_a_killed_prefill_worker_is_done_without_and_used_again_when_it_is_back(
    deployment: Running,
) -> None:
    engines = [
        engine
        for name in PREFILL_WORKERS
        for engine in psutil.Process(deployment.cluster.process(name).pid).children(recursive=True)
    ]
    for name in PREFILL_WORKERS:
        deployment.cluster.kill(name, signal.SIGKILL)
    answer = await asyncio.to_thread(deployment.chat, "Nobody helps. " + LONG_PROMPT)
    assert answer.status == 200
    assert answer.prefill_worker is None
    # No engine outlives its worker.
    await until(lambda: not any(engine.is_running() for engine in engines))
    await restart(deployment, "prefill_worker-0")

    async def is_used_again() -> bool:
        prompt = f"{asyncio.get_running_loop().time()} {LONG_PROMPT}"
        return (await asyncio.to_thread(deployment.chat, prompt)).prefill_worker is not None

    await eventually(is_used_again)
