"""A real deployment that embeds: vLLM and a real model in float32."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from deploy.local import default_model, topology
from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.running import LONG_PROMPT, Running, running
from tests.fixtures.eventually import WAIT_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

DIMENSIONS = 576
CUT = 64
CONTEXT_TOKENS = 512
TEXTS = [
    "A cat sits on the mat.",
    "A kitten is sitting on a rug.",
    "Stock markets fell sharply on Monday.",
    "Share prices dropped at the start of the week.",
    LONG_PROMPT[:1500],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, said to be trained to have its vectors cut short."""
    folder = tmp_path_factory.mktemp("models") / "matryoshka"
    folder.mkdir()
    for file in default_model.model_folder(print).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [CUT, 128]}))
    return folder


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("run"),
        engine="vllm",
        model=model,
        flags={"decode_worker": ("--task", "embed")},
        ready_seconds=240,
        prefill=0,
        decode=1,
        max_model_len_tokens=CONTEXT_TOKENS,
    ) as it:
        yield it


@pytest.fixture
async def client(deployment: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


async def embed(
    deployment: Running, client: openai.AsyncOpenAI, texts: list[str], salt: str = "", **more: int
) -> list[list[float]]:
    made = await client.embeddings.create(
        model=deployment.model, input=texts, extra_body={"cache_salt": salt, **more}
    )
    return [item.embedding for item in made.data]


def plain_vllm(model: Path, lengths: list[int | None]) -> list[list[list[float]]]:
    """By vLLM itself, in a process of its own."""
    result = subprocess.run(
        [
            topology.REPOSITORY / ".venv-vllm/bin/python",
            Path(__file__).with_name("plain_vllm_embed.py"),
        ],
        input=json.dumps({"model": str(model), "prompts": TEXTS, "dimensions": lengths}),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[list[list[float]]] = json.loads(result.stdout.splitlines()[-1])
    return found


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_vectors_are_those_of_vllm_itself_of_length_1_and_near_where_texts_are(
    deployment: Running, client: openai.AsyncOpenAI, model: Path
) -> None:
    vectors = await embed(deployment, client, TEXTS)
    for vector in vectors:
        assert len(vector) == DIMENSIONS
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    related = min(cosine(vectors[0], vectors[1]), cosine(vectors[2], vectors[3]))
    unrelated = [cosine(vectors[i], vectors[j]) for i in (0, 1) for j in (2, 3)]
    assert related > max(unrelated)
    cut = await embed(deployment, client, TEXTS, dimensions=CUT)
    plain, plain_cut = await asyncio.to_thread(plain_vllm, model, [None, CUT])
    for found, expected in zip([*vectors, *cut], [*plain, *plain_cut], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


async def test_a_batch_or_a_cache_changes_nothing(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    alone = [(await embed(deployment, client, [text], salt="alone"))[0] for text in TEXTS]
    batched = await embed(deployment, client, TEXTS * 8, salt="batched")
    cached = await embed(deployment, client, TEXTS, salt="batched")
    for index, vector in enumerate([*batched, *cached]):
        assert vector == pytest.approx(alone[index % len(TEXTS)], abs=1e-5)


async def test_what_is_cached_is_not_computed_again(deployment: Running) -> None:
    request = inference_pb2.EmbedRequest(
        model=deployment.model, inputs=[inference_pb2.EmbedInput(text=TEXTS[-1])]
    )
    request.kv.cache_salt = "twice"
    async with deployment.channel("frontend-0") as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = (
            inference_pb2_grpc.InferenceServiceStub(channel)
        )
        first = await stub.Embed(request, timeout=WAIT_SECONDS)
        again = await stub.Embed(request, timeout=WAIT_SECONDS)
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 32
    assert [*again.embeddings[0].values] == pytest.approx([*first.embeddings[0].values], abs=1e-5)


async def test_what_the_model_can_not_do_is_refused(
    deployment: Running, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(
        openai.BadRequestError, match="only supports Matryoshka dimensions"
    ) as raised:
        await embed(deployment, client, ["a"], dimensions=100)
    assert raised.value.param == "dimensions"
    assert "/" not in raised.value.message
    with pytest.raises(openai.BadRequestError, match="maximum context length") as raised:
        await embed(deployment, client, [LONG_PROMPT])
    assert raised.value.code == "context_length_exceeded"
    [vector] = await embed(deployment, client, [LONG_PROMPT], truncate_prompt_tokens=-1)
    assert len(vector) == DIMENSIONS
    answer = await asyncio.to_thread(deployment.chat, "hello")
    assert (answer.status, answer.body["error"]["code"]) == (400, "unsupported_model")
