"""Embed of the public gRPC API, over a real connection."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from switchgear.inference.v1.inference_pb2 import EmbedRequest
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import CONTEXT_TOKENS, NAME, tokens
from tests.services.frontend.fake_router import (
    Behaviour,
    FakeRouter,
    embeds,
    never_answers,
    vector,
)
from tests.services.frontend.frontends import Frontend
from tests.services.frontend.test_embeddings import embedding
from tests.services.frontend.test_inference_api import calling


@asynccontextmanager
async def embedding_stub(
    folder: Path, behaviour: Behaviour
) -> AsyncIterator[tuple[FakeRouter, Frontend, inference_pb2_grpc.InferenceServiceAsyncStub]]:
    async with (
        embedding(folder, behaviour) as (router, started),
        calling(started) as channel,
    ):
        yield router, started, inference_pb2_grpc.InferenceServiceStub(channel)


def texts(*given: str) -> list[inference_pb2.EmbedInput]:
    return [inference_pb2.EmbedInput(text=text) for text in given]


async def test_inputs_become_vectors_in_order(tmp_path: Path) -> None:
    async with embedding_stub(tmp_path, embeds()) as (router, started, stub):
        as_tokens = inference_pb2.EmbedInput(
            token_ids=inference_pb2.TokenIds(token_ids=tokens("two"))
        )
        answer = await stub.Embed(EmbedRequest(model=NAME, inputs=[*texts("one"), as_tokens]))
        found = [struct.pack("<8f", *one.values) for one in answer.embeddings]
        assert found == [vector(tokens("one")), vector(tokens("two"))]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 0)
        cut = EmbedRequest(model=NAME, inputs=texts("long"), truncate_tokens=2, dimensions=4)
        await stub.Embed(cut)
        generation = router.calls[-1].generation
        assert list(generation.token_ids) == tokens("lo")
        assert generation.pooling.dimensions == 4
        [model] = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert list(model.pooling_tasks) == [generation_pb2.POOLING_TASK_EMBED]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(inference_pb2.GenerateRequest(model=NAME, text="a")).read()
        assert reason_and_param(raised.value) == ("TASK_NOT_SUPPORTED", "model")
        labels = {"model": NAME, "endpoint": "embed", "status": "OK"}
        assert started.metric("requests_total", **labels) == 2


def reason_and_param(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason, info.metadata["param"]


@pytest.mark.parametrize(
    ("request_", "reason", "param"),
    [
        (EmbedRequest(model=NAME), "INVALID_REQUEST", "inputs"),
        (EmbedRequest(model=NAME, inputs=texts("a") * 2049), "INVALID_REQUEST", "inputs"),
        (EmbedRequest(model=NAME, inputs=texts("")), "INVALID_REQUEST", "inputs"),
        (EmbedRequest(model=NAME, inputs=texts("a", "")), "INVALID_REQUEST", "inputs[1]"),
        (
            EmbedRequest(model=NAME, inputs=[inference_pb2.EmbedInput()]),
            "INVALID_REQUEST",
            "inputs",
        ),
        (
            EmbedRequest(model=NAME, inputs=texts("x" * (CONTEXT_TOKENS + 1))),
            "CONTEXT_TOO_LONG",
            "inputs",
        ),
        (
            EmbedRequest(model=NAME, inputs=texts("a"), dimensions=0),
            "INVALID_REQUEST",
            "dimensions",
        ),
        (
            EmbedRequest(model=NAME, inputs=texts("a"), truncate_tokens=CONTEXT_TOKENS + 1),
            "INVALID_REQUEST",
            "truncate_tokens",
        ),
        (EmbedRequest(model="x", inputs=texts("a")), "MODEL_NOT_FOUND", "model"),
    ],
)
async def test_a_bad_embed_request_is_refused_with_its_reason(
    tmp_path: Path, request_: inference_pb2.EmbedRequest, reason: str, param: str
) -> None:
    async with embedding_stub(tmp_path, embeds()) as (router, _, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Embed(request_)
        assert reason_and_param(raised.value) == (reason, param)
        assert router.calls == []


async def test_embedding_ends_with_its_call_and_its_deadline(tmp_path: Path) -> None:
    async with embedding_stub(tmp_path, never_answers) as (router, started, stub):
        request = EmbedRequest(model=NAME, inputs=texts("a", "b"))
        call = stub.Embed(request)
        await until(lambda: len(router.calls) == 2)
        call.cancel()
        await until(lambda: len(router.cancelled_handles) == 2)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Embed(request, timeout=0.3)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: len(router.cancelled_handles) == 4)
        await until(lambda: started.metric("in_flight_requests") == 0)
