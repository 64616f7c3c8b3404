"""/tokenize and /detokenize, and their gRPC calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.services.frontend.byte_model import CONTEXT_TOKENS, NAME, tokens
from tests.services.frontend.fake_router import fake_router, says
from tests.services.frontend.frontends import frontend
from tests.services.frontend.test_inference_api import calling

MESSAGES = [{"role": "user", "content": "Grüße"}]
CHAT = "<|bos|><|im_start|>user\nGrüße<|im_end|>\n"
OPENING = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "Grüße"}, "Grüße"),
        ({"prompt": "Grüße", "model": NAME, "add_special_tokens": False}, "Grüße"),
        ({"prompt": ""}, ""),
        ({"messages": MESSAGES}, CHAT + OPENING),
        ({"messages": MESSAGES, "add_generation_prompt": False}, CHAT),
        ({"prompt": "x" * 10_000}, "x" * 10_000),
    ],
)
async def test_text_becomes_tokens_and_text_again(
    tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        body = (await started.client.post("/tokenize", json=fields)).json()
        assert body == {
            "count": len(tokens(text)),
            "max_model_len": CONTEXT_TOKENS,
            "tokens": tokens(text),
            "token_strs": None,
        }
        back = await started.client.post("/detokenize", json={"tokens": body["tokens"]})
        assert back.json() == {"prompt": text}
        assert not router.calls


async def test_tokenize_gives_what_generation_uses(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        body = (await started.client.post("/tokenize", json={"messages": MESSAGES})).json()
        await started.chat(messages=MESSAGES)
        assert list(router.calls[0].generation.token_ids) == body["tokens"]


async def test_token_strings_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        fields = {"prompt": "a b", "return_token_strs": True}
        body = (await started.client.post("/tokenize", json=fields)).json()
        assert body["token_strs"] == ["a", "Ġ", "b"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [70_000]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)
async def test_bad_requests_are_refused_by_name(
    tmp_path: Path, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    async with fake_router(says("ok")) as router, frontend(tmp_path, [router]) as started:
        response = await started.client.post(path, json=fields)
        assert response.status_code == status, response.text
        assert response.json()["error"]["param"] == param


async def test_the_model_may_be_left_out_only_where_there_is_one(tmp_path: Path) -> None:
    async with frontend(tmp_path, cards=[]) as started:
        response = await started.client.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "model"


async def test_grpc_has_the_same_calls(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router]) as started,
        calling(started) as channel,
    ):
        stub = InferenceServiceStub(channel)
        plain = inference_pb2.TokenizeRequest(model=NAME, text="Grüße", omit_special_tokens=True)
        assert list((await stub.Tokenize(plain)).token_ids) == tokens("Grüße")
        chat = inference_pb2.TokenizeRequest(model=NAME, omit_answer_opening=True)
        chat.messages.messages.add(role="user", content="Grüße")
        answer = await stub.Tokenize(chat)
        assert list(answer.token_ids) == tokens(CHAT)
        assert answer.context_length_tokens == CONTEXT_TOKENS
        back = inference_pb2.DetokenizeRequest(model=NAME, token_ids=answer.token_ids)
        assert (await stub.Detokenize(back)).text == CHAT
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Tokenize(inference_pb2.TokenizeRequest(model=NAME))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        unknown = inference_pb2.DetokenizeRequest(model=NAME, token_ids=[70_000])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Detokenize(unknown)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
