"""The public gRPC API, over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from libs.common.errors import Overloaded
from libs.common.grpc_server import serving
from libs.common.tasks import background
from services.frontend.main import SERVICE_NAME, report_health
from services.frontend.servicer import InferenceServicer
from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import CONTEXT_TOKENS, NAME, tokens
from tests.services.frontend.fake_router import Call, fake_router, never_answers, says
from tests.services.frontend.frontends import Frontend, frontend

Request = inference_pb2.GenerateRequest


@asynccontextmanager
async def calling(started: Frontend) -> AsyncIterator[grpc.aio.Channel]:
    def add(server: grpc.aio.Server) -> None:
        add_InferenceServiceServicer_to_server(InferenceServicer(started.pipeline), server)

    async with (
        serving("127.0.0.1", 0, add, [SERVICE_NAME], grace_seconds=0) as server,
        background(report_health(started.pipeline, server)),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel


async def test_text_messages_and_tokens_are_prompts(tmp_path: Path) -> None:
    prompts = {
        "text": Request(text="Hi"),
        "token_ids": Request(token_ids=inference_pb2.TokenIds(token_ids=tokens("Hi"))),
        "messages": Request(
            messages=inference_pb2.Messages(
                messages=[inference_pb2.Message(role="user", content="Hi")]
            )
        ),
    }
    async with (
        fake_router(says("Grüße")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        for request in prompts.values():
            request.model = NAME
            answer = [part async for part in InferenceServiceStub(channel).Generate(request)]
            assert "".join(part.text for part in answer) == "Grüße"
            assert [part.finish_reason for part in answer[:-1]] == [0] * (len(answer) - 1)
            assert answer[-1].finish_reason == generation_pb2.FINISH_REASON_STOP
            assert answer[-1].usage.completion_tokens == 8
        sent = [list(call.generation.token_ids) for call in router.calls]
        assert sent[0] == sent[1] == tokens("Hi")
        assert sent[2] == tokens("<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


async def test_stop_strings_and_sampling_are_obeyed(tmp_path: Path) -> None:
    async with (
        fake_router(says("one two")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        request = Request(model=NAME, text="Hi", stop=[" t"])
        request.sampling.temperature = 0.5
        answer = [part async for part in InferenceServiceStub(channel).Generate(request)]
        assert "".join(part.text for part in answer) == "one"
        assert router.calls[0].generation.sampling.temperature == 0.5


async def test_what_is_asked_of_the_output_works_as_over_http(tmp_path: Path) -> None:
    async with (
        fake_router(says("éa.")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        request = Request(
            model=NAME,
            text="Hi",
            stop=["."],
            includes_stop=True,
            priority=-1,
            kv=generation_pb2.KvOptions(cache_salt="tenant"),
            logprobs=generation_pb2.LogprobOptions(output_alternatives=1, prompt_alternatives=0),
        )
        request.sampling.logit_bias[5] = 2
        request.sampling.constraint.regex = ".+"
        answer = [part async for part in InferenceServiceStub(channel).Generate(request)]
        assert "".join(part.text for part in answer) == "éa."
        found = [token for part in answer for token in part.logprobs]
        assert b"".join(token.token.bytes for token in found) == "éa.".encode()
        assert [token.token.logprob for token in found] == [-0.5] * 4
        assert found[2].alternatives == [
            inference_pb2.Candidate(token_id=tokens("`")[0], bytes=b"`", logprob=-0.25)
        ]
        first, second = answer[0].prompt_logprobs
        assert (first.token.bytes, first.token.HasField("logprob")) == (b"H", False)
        assert (second.token.bytes, second.token.logprob) == (b"i", -0.5)
        sent = router.calls[0].generation
        assert sent.sampling == request.sampling
        assert (sent.kv, sent.priority) == (request.kv, -1)


@pytest.mark.parametrize(
    ("request_", "code", "reason", "param"),
    [
        (Request(model=NAME), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "prompt"),
        (
            Request(
                model=NAME,
                text="a",
                sampling=generation_pb2.SamplingOptions(temperature=9),
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            "sampling.temperature",
        ),
        (
            Request(model=NAME, text="a", sampling=generation_pb2.SamplingOptions(top_p=0)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            "sampling.top_p",
        ),
        (
            Request(model=NAME, text="a", stop=[""]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
            "stop",
        ),
        (
            Request(model=NAME, text="a" * CONTEXT_TOKENS),
            grpc.StatusCode.INVALID_ARGUMENT,
            "CONTEXT_TOO_LONG",
            "prompt",
        ),
        (Request(model="x", text="a"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "model"),
    ],
)
async def test_a_bad_request_is_refused_with_its_reason(
    tmp_path: Path, request_: Request, code: grpc.StatusCode, reason: str, param: str
) -> None:
    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await InferenceServiceStub(channel).Generate(request_).read()
        assert raised.value.code() == code
        status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.reason, info.metadata["param"]) == (reason, param)


async def test_overload_tells_when_to_come_back(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.fail(Overloaded("full", retry_after_seconds=3))

    async with (
        fake_router(behave) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await InferenceServiceStub(channel).Generate(Request(model=NAME, text="a")).read()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.seconds == 3


async def test_cancelling_the_call_cancels_the_request(tmp_path: Path) -> None:
    async with (
        fake_router(never_answers) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        call = InferenceServiceStub(channel).Generate(Request(model=NAME, text="a"))
        await until(lambda: router.calls)
        call.cancel()
        await until(lambda: router.cancelled_handles)
        await until(lambda: started.metric("in_flight_requests") == 0)


async def test_the_callers_deadline_ends_the_request(tmp_path: Path) -> None:
    async with (
        fake_router(never_answers) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(Request(model=NAME, text="a"), timeout=0.3).read()
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert router.calls[0].submit.routing.timeout.nanos < 300_000_000
        await until(lambda: router.cancelled_handles)


async def test_models_and_health_tell_what_can_be_served(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        stub = InferenceServiceStub(channel)
        [model] = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.model, model.context_length_tokens) == (NAME, CONTEXT_TOKENS)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        )
        healthy = health_pb2.HealthCheckResponse.SERVING
        while (await watch.read()).status != healthy:
            pass
        started.list_cards()
        assert (await watch.read()).status != healthy
