"""How callers steer routing: headers over HTTP, a field over gRPC."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchgear.common.v1 import routing_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.services.frontend.byte_model import NAME
from tests.services.frontend.fake_router import fake_router, says
from tests.services.frontend.frontends import Frontend, frontend
from tests.services.frontend.test_inference_api import calling

BODY = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}


async def chat_with(started: Frontend, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    response = await started.client.post("/v1/chat/completions", json=BODY, headers=headers)
    return response.status_code, response.json().get("error", {})


async def test_headers_reach_the_router(tmp_path: Path) -> None:
    headers = {
        "X-Switchgear-Policy": "kv",
        "X-Switchgear-Routing-Temperature": "0.5",
        "X-Switchgear-Pin": "decode_worker-0, prefill_worker-1",
        "X-Switchgear-Exclude": "decode_worker-2",
        "X-Switchgear-Session-Id": "session 1",
    }
    async with fake_router(says("Hi")) as router, frontend(tmp_path, [router]) as started:
        assert (await chat_with(started, headers))[0] == 200
        assert (await chat_with(started, {"X-Switchgear-Other": "x"}))[0] == 200
        steered, plain = (call.submit.routing for call in router.calls)
        assert steered.options == routing_pb2.RoutingOptions(
            policy="kv",
            temperature=0.5,
            pinned_workers=["decode_worker-0", "prefill_worker-1"],
            excluded_workers=["decode_worker-2"],
            session_id="session 1",
        )
        assert not plain.HasField("options")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-switchgear-routing-temperature", "hot"),
        ("x-switchgear-routing-temperature", "-1"),
        ("x-switchgear-routing-temperature", "nan"),
        ("x-switchgear-pin", ""),
        ("x-switchgear-session-id", "s" * 2000),
    ],
)
async def test_a_bad_header_is_named(tmp_path: Path, header: str, value: str) -> None:
    async with fake_router(says("Hi")) as router, frontend(tmp_path, [router]) as started:
        status, error = await chat_with(started, {header: value})
        assert status == 400
        assert error["param"] == header
        assert router.calls == []


async def test_a_grpc_request_has_a_field_for_it(tmp_path: Path) -> None:
    options = routing_pb2.RoutingOptions(pinned_workers=["decode_worker-0"])
    async with (
        fake_router(says("Hi")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        stub = InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model=NAME, text="Hi", routing=options)
        async for _ in stub.Generate(request):
            pass
        assert router.calls[0].submit.routing.options == options
