"""The kinds of requests, how often each is sent, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc

from benchmarks.soak.http_client import HttpConnection
from switchgear.common.v1 import generation_pb2
from switchgear.inference.v1 import inference_pb2, inference_pb2_grpc
from switchgear.router.v1 import router_pb2, router_pb2_grpc

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 60
"""Some 600 tokens: enough to be worth a prefill worker."""
_MANY_TOKENS = 200
"""Of outputs that nobody waits for."""
_GRPC_SECONDS = 60.0
_OK = grpc.StatusCode.OK.name


@dataclass(frozen=True, slots=True)
class Lane:
    """One client: it sends a request when the one before has ended."""

    model: str
    http: HttpConnection
    frontend: inference_pb2_grpc.InferenceServiceAsyncStub
    router: router_pb2_grpc.RouterServiceAsyncStub
    random: Random


Send = Callable[[Lane, int], Awaitable[str]]
"""Sends one request, whose number makes its prompt its own; what came of it, in a word."""


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    weight: int
    """How many of 100 requests are of this kind."""
    outcome: str
    """The only good one."""
    send: Send


def _body(lane: Lane, prompt: str, max_tokens: int, **fields: Any) -> bytes:
    request = {
        "model": lane.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **fields,
    }
    return json.dumps(request).encode()


async def _streamed(lane: Lane, body: bytes) -> str:
    answer = await lane.http.post(_CHAT, body)
    if answer.status == 200 and not answer.body.endswith(b"data: [DONE]\n\n"):
        return "200 without an end"
    return str(answer.status)


async def _streamed_chat(lane: Lane, number: int) -> str:
    return await _streamed(lane, _body(lane, f"{number}?", 16, stream=True))


async def _long_prompt(lane: Lane, number: int) -> str:
    return await _streamed(lane, _body(lane, f"{number} {_LONG_TEXT}", 12, stream=True))


async def _stopped(lane: Lane, number: int) -> str:
    return await _streamed(lane, _body(lane, f"{number}?", 100, stream=True, stop=["e", "a"]))


async def _whole_chat(lane: Lane, number: int) -> str:
    return str((await lane.http.post(_CHAT, _body(lane, f"Whole {number}", 8))).status)


async def _several_prompts(lane: Lane, number: int) -> str:
    prompts = [f"{number} {word}" for word in ("one", "two", "three")]
    body = json.dumps({"model": lane.model, "prompt": prompts, "max_tokens": 6}).encode()
    return str((await lane.http.post(_COMPLETIONS, body)).status)


async def _leaves_mid_stream(lane: Lane, number: int) -> str:
    body = _body(lane, f"{number}?", _MANY_TOKENS, stream=True)
    await lane.http.post_and_leave(_CHAT, body, after_bytes=lane.random.randrange(1, 8_000))
    return "left"


async def _leaves_before_the_answer(lane: Lane, number: int) -> str:
    seconds = lane.random.uniform(0, 0.1)
    body = _body(lane, f"{number}?", _MANY_TOKENS)
    await lane.http.post_and_leave_at_once(_CHAT, body, after_seconds=seconds)
    return "left"


async def _leaves_while_prefilling(lane: Lane, number: int) -> str:
    seconds = lane.random.uniform(0, 0.03)
    body = _body(lane, f"{number} {_LONG_TEXT}", _MANY_TOKENS, stream=True)
    await lane.http.post_and_leave_at_once(_CHAT, body, after_seconds=seconds)
    return "left"


async def _not_json(lane: Lane, number: int) -> str:
    return str((await lane.http.post(_CHAT, b'{"model": ' + str(number).encode())).status)


async def _bad_field(lane: Lane, number: int) -> str:
    body = _body(lane, f"{number}?", 8, temperature=-1 - number)
    return str((await lane.http.post(_CHAT, body)).status)


async def _too_many_tokens(lane: Lane, number: int) -> str:
    return str((await lane.http.post(_CHAT, _body(lane, f"{number}?", 10_000_000))).status)


async def _unknown_model(lane: Lane, number: int) -> str:
    body = _body(lane, "Anybody?", 8, model=f"model-{number}")
    return str((await lane.http.post(_CHAT, body)).status)


def _grpc_request(lane: Lane, number: int, max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model=lane.model,
        text=f"{number}, said the client",
        stopping=generation_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=True),
    )


async def _grpc(lane: Lane, number: int) -> str:
    call = lane.frontend.Generate(_grpc_request(lane, number, 16), timeout=_GRPC_SECONDS)
    return await _to_the_end(call)


async def _grpc_deadline(lane: Lane, number: int) -> str:
    seconds = lane.random.uniform(0.005, 0.1)
    call = lane.frontend.Generate(_grpc_request(lane, number, _MANY_TOKENS), timeout=seconds)
    return await _to_the_end(call)


async def _grpc_cancelled(lane: Lane, number: int) -> str:
    call = lane.frontend.Generate(_grpc_request(lane, number, _MANY_TOKENS), timeout=_GRPC_SECONDS)
    for _ in range(lane.random.randrange(4)):
        await call.read()
    call.cancel()
    return (await call.code()).name


async def _plain_router_call(lane: Lane, number: int) -> str:
    generation = generation_pb2.Generation(
        request_id=f"plain-{number}",
        model=lane.model,
        token_ids=[number % 40_000, *range(100, 140)],
        stopping=generation_pb2.StoppingOptions(max_tokens=8, ignore_eos=True),
    )
    request = router_pb2.GenerateRequest(generation=generation)
    return await _to_the_end(lane.router.Generate(request, timeout=_GRPC_SECONDS))


async def _to_the_end(call: grpc.aio.UnaryStreamCall[Any, Any]) -> str:
    while True:
        try:
            if await call.read() is grpc.aio.EOF:
                break
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return (await call.code()).name


KINDS = (
    Kind("streamed chat", 28, "200", _streamed_chat),
    Kind("chat in one piece", 16, "200", _whole_chat),
    Kind("long prompt", 8, "200", _long_prompt),
    Kind("ended by a stop string", 4, "200", _stopped),
    Kind("three prompts at once", 4, "200", _several_prompts),
    Kind("client leaves mid-stream", 8, "left", _leaves_mid_stream),
    Kind("client leaves before the answer", 4, "left", _leaves_before_the_answer),
    Kind("client leaves during a long prompt", 4, "left", _leaves_while_prefilling),
    Kind("not JSON", 2, "400", _not_json),
    Kind("field out of range", 2, "400", _bad_field),
    Kind("more tokens than the context", 2, "400", _too_many_tokens),
    Kind("unknown model", 4, "404", _unknown_model),
    Kind("gRPC", 4, _OK, _grpc),
    Kind("gRPC, deadline passes", 4, grpc.StatusCode.DEADLINE_EXCEEDED.name, _grpc_deadline),
    Kind("gRPC, cancelled", 3, grpc.StatusCode.CANCELLED.name, _grpc_cancelled),
    Kind("plain call on a router", 3, _OK, _plain_router_call),
)
