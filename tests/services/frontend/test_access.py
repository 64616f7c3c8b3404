"""API keys: who gets in, how far, and how changes arrive. Over real HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from libs.common.config import ConfigError
from libs.common.discovery import Discovery
from libs.common.hashing import sequence_hashes
from services.frontend import key_sources
from services.frontend.access import ANYONE, duration_text
from services.frontend.config import FrontendSettings
from services.frontend.core.api_keys import digest_of, new_key
from services.frontend.key_sources import controlled_access
from switchgear.access.v1 import access_pb2
from switchgear.inference.v1 import inference_pb2
from switchgear.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import ServerProcess
from tests.services.frontend.byte_model import BLOCK_TOKENS, NAME, card
from tests.services.frontend.fake_router import FakeRouter, fake_router, never_answers, says
from tests.services.frontend.frontends import WORKER_ID, Frontend, file_server, frontend
from tests.services.frontend.stored_keys import GOOD, stored, write
from tests.services.frontend.test_inference_api import calling

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
OTHER = new_key(b"o" * 32)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@asynccontextmanager
async def guarded(
    folder: Path, *keys: access_pb2.ApiKey, router: FakeRouter
) -> AsyncIterator[Frontend]:
    """A frontend with these keys; its client sends the good one."""
    path = folder / "keys.json"
    write(path, *keys)
    async with frontend(folder, [router], api_keys=str(path)) as started:
        started.client.headers.update(bearer(GOOD))
        yield started


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        bearer("sk-wrong"),
        bearer(GOOD + "x"),
        {"authorization": GOOD},
        {"authorization": "Basic " + GOOD},
        {"authorization": "Bearer \xff\xfe"},
    ],
)
async def test_without_a_good_key_nobody_gets_in(tmp_path: Path, headers: dict[str, str]) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(), router=router) as started,
        httpx.AsyncClient(base_url=started.url) as client,
    ):
        encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/tokenize"),
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{NAME}"),
            ("GET", "/metrics"),
            ("GET", "/no/such"),
        ):
            response = await client.request(method, path, headers=encoded, content=b"{")
            assert response.status_code == 401, path
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            assert GOOD not in response.text
        assert not router.calls


async def test_probes_and_documentation_need_no_key_and_tell_nothing(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(), router=router) as started,
        httpx.AsyncClient(base_url=started.url) as client,
    ):
        for path in ("/health", "/ready", "/live", "/openapi.json", "/docs"):
            response = await client.get(path)
            assert response.status_code == 200, path
            assert NAME not in response.text
        # Not on the public port, with whatever key.
        assert (await started.client.get("/metrics")).status_code == 404


async def test_a_key_is_for_its_models_only(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        file_server() as (_, worker),
        guarded(
            tmp_path,
            stored(models=["other", "alias"]),
            stored(OTHER, "other-key", models=[NAME]),
            router=router,
        ) as started,
    ):
        started.list_instances(worker, router.instance)
        started.list_cards(
            card(WORKER_ID),
            card(WORKER_ID, model="other"),
            card(WORKER_ID, model="third", aliases=("alias",)),
        )
        await until(lambda: len(started.models.served()) == 3)
        for refused in (await started.chat(), await started.complete()):
            assert refused.status_code == 403
            assert refused.json()["error"] == {
                "message": f"The API key 'good' does not have access to model '{NAME}'",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        assert (await started.client.get(f"/v1/models/{NAME}")).status_code == 403
        assert (await started.complete(model="none")).status_code == 404
        assert (await started.complete(model="alias")).status_code == 200
        assert (await started.complete(model="third")).status_code == 403
        listed = (await started.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["other", "alias"]
        # A request that names no model means the only one that the key is for.
        tokens = await started.client.post("/tokenize", json={"prompt": "a"}, headers=bearer(OTHER))
        assert tokens.status_code == 200


async def test_requests_a_minute_are_limited_and_the_headers_tell(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(requests_per_minute=2), router=router) as started,
    ):
        first = await started.chat()
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] in ("30s", "29s")
        assert "x-ratelimit-limit-tokens" not in first.headers
        assert (await started.chat(stream=True)).headers["x-ratelimit-remaining-requests"] == "0"
        refused = await started.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "requests"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 20 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert started.metric("errors_total", reason="REQUESTS_LIMITED") == 1
        assert started.metric("in_flight_requests") == 0


async def test_tokens_a_minute_are_reserved_and_settled(tmp_path: Path) -> None:
    async with (
        fake_router(says("four")) as router,
        guarded(tmp_path, stored(tokens_per_minute=6000), router=router) as started,
    ):
        first = await started.complete(prompt="x" * 100, max_tokens=1900)
        # While it ran, what it might have used was gone.
        assert first.status_code == 200
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 4100
        used = first.json()["usage"]["total_tokens"]
        assert used == 105
        models = await started.client.get("/v1/models")
        assert int(models.headers["x-ratelimit-remaining-tokens"]) >= 6000 - used
        for _ in range(3):
            await started.complete(prompt="x" * 1990, max_tokens=5)
        refused = await started.complete(prompt="x" * 1990, max_tokens=5)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "tokens"
        assert int(refused.headers["retry-after"]) >= 1


async def test_a_request_that_nobody_served_costs_no_tokens(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(tokens_per_minute=600), router=router) as started,
    ):
        started.list_instances()
        await until(lambda: not started.sessions.is_connected)
        failed = await started.complete(prompt="x" * 500)
        assert failed.status_code == 503
        left = await started.client.get("/v1/models")
        assert left.headers["x-ratelimit-remaining-tokens"] == "600"


async def test_places_at_the_same_time_are_limited_and_come_back(tmp_path: Path) -> None:
    async with (
        fake_router(never_answers) as router,
        guarded(
            tmp_path, stored(concurrent_requests=1), stored(OTHER, "other"), router=router
        ) as started,
    ):
        running = asyncio.create_task(started.chat())
        await until(lambda: router.calls)
        refused = await started.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "requests"
        router.behaviour = says("ok")
        body = {"model": NAME, "prompt": "a"}
        other = await started.client.post("/v1/completions", json=body, headers=bearer(OTHER))
        assert other.status_code == 200
        running.cancel()
        await until(lambda: router.cancelled_handles)
        await until(lambda: started.metric("in_flight_requests") == 0)
        assert (await started.chat()).status_code == 200


async def test_tenants_share_no_cached_blocks(tmp_path: Path) -> None:
    third = new_key(b"t" * 32)
    async with (
        fake_router(says("ok")) as router,
        guarded(
            tmp_path,
            stored(),
            stored(OTHER, "other"),
            stored(third, "third", tenant="good"),
            router=router,
        ) as started,
    ):
        for key in (GOOD, OTHER, third):
            await started.client.post(
                "/v1/completions", json={"model": NAME, "prompt": "x" * 8}, headers=bearer(key)
            )
        salts = [call.generation.kv.cache_salt for call in router.calls]
        assert salts == ["good/", "other/", "good/"]
        hashes = [list(call.submit.routing.sequence_hashes) for call in router.calls]
        assert hashes[0] == hashes[2] != hashes[1]
        token_ids = router.calls[1].generation.token_ids
        assert hashes[1] == sequence_hashes(token_ids, BLOCK_TOKENS, cache_salt="other/")


async def test_a_callers_salt_and_priority_stay_within_its_key(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(priority=5), stored(OTHER, "other"), router=router) as started,
    ):
        access = started.pipeline.access
        good, other = access.caller(f"Bearer {GOOD}"), access.caller(f"bearer  {OTHER}")
        assert good.cache_salt("other/") != other.cache_salt("")
        assert [good.priority(asked) for asked in (-9, 0, 5, 7)] == [5, 5, 5, 7]
        assert [other.priority(asked) for asked in (-9, 0, 7)] == [0, 0, 7]
        assert (ANYONE.cache_salt("mine"), ANYONE.priority(-9)) == ("mine", -9)


async def test_only_a_key_that_says_so_may_steer_routing_and_sessions_stay_with_their_tenant(
    tmp_path: Path,
) -> None:
    body = {"model": NAME, "prompt": "a"}
    steering, session = {"x-switchgear-policy": "random"}, {"x-switchgear-session-id": "mine"}
    async with (
        fake_router(says("ok")) as router,
        guarded(
            tmp_path, stored(), stored(OTHER, "other", steers_routing=True), router=router
        ) as started,
    ):
        refused = await started.client.post(
            "/v1/completions", json=body, headers=bearer(GOOD) | steering
        )
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "routing_not_allowed"
        for key, headers in ((GOOD, session), (OTHER, session | steering)):
            given = await started.client.post(
                "/v1/completions", json=body, headers=bearer(key) | headers
            )
            assert given.status_code == 200, given.text
        asked = [call.submit.routing.options for call in router.calls]
        assert [options.session_id for options in asked] == ["good/mine", "other/mine"]
        assert [options.policy for options in asked] == ["", "random"]


async def test_what_may_not_be_routed_as_asked_takes_no_tokens_from_the_limit(
    tmp_path: Path,
) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(tokens_per_minute=10), router=router) as started,
    ):
        body = {"model": NAME, "prompt": "a", "max_tokens": 9}
        steering = {"x-switchgear-policy": "random"}
        refused = await started.client.post("/v1/completions", json=body, headers=steering)
        assert refused.status_code == 403
        given = await started.client.post("/v1/completions", json=body)
        assert given.status_code == 200, given.text


async def test_a_callers_request_id_names_nothing_inside(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(), router=router) as started,
    ):
        for _ in range(2):
            await started.client.post(
                "/v1/completions",
                json={"model": NAME, "prompt": "a"},
                headers={"x-request-id": "same"},
            )
        inside = {call.generation.request_id for call in router.calls}
        assert len(inside) == 2
        assert "same" not in inside


async def test_changes_of_the_file_arrive_while_requests_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(key_sources, "FILE_POLL_SECONDS", 0.02)
    path = tmp_path / "keys.json"

    async with (
        fake_router(says("ok")) as router,
        guarded(tmp_path, stored(requests_per_minute=100), router=router) as started,
    ):

        async def status(key: str) -> int:
            response = await started.client.get("/v1/models", headers=bearer(key))
            return response.status_code

        await started.complete()
        write(path, stored(requests_per_minute=50), stored(OTHER, "other"))

        async def other_gets_in() -> bool:
            return await status(OTHER) == 200

        await eventually(other_gets_in)
        left = (await started.client.get("/v1/models")).headers
        # What was used before is still used.
        assert left["x-ratelimit-limit-requests"] == "50"
        assert int(left["x-ratelimit-remaining-requests"]) in (49, 50)

        # A file with a mistake changes nothing, and says so.
        path.write_text('{"keys": [{"key_id": "good"}]}')
        await until(lambda: "API keys not read" in capsys.readouterr().out)
        assert (await status(GOOD), await status(OTHER)) == (200, 200)

        write(path, stored(OTHER, "other"))

        async def good_is_out() -> bool:
            return await status(GOOD) == 401

        await eventually(good_is_out)
        assert await status(OTHER) == 200


async def test_keys_in_etcd_are_followed(etcd_server: ServerProcess, tmp_path: Path) -> None:
    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.frontend", "keys", *arguments],
            capture_output=True,
            env=ENVIRONMENT | environment,
            text=True,
            timeout=60,
            check=True,
        )

    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router], api_keys="etcd", etcd_url=etcd_server.url) as started,
    ):

        async def status(key: str) -> int:
            response = await started.client.get("/v1/models", headers=bearer(key))
            return response.status_code

        async def nobody_gets_in() -> bool:
            return await status(GOOD) == 401

        await eventually(nobody_gets_in)  # Before etcd was read: 503.
        etcd = ("--etcd-url", etcd_server.url)
        added = await asyncio.to_thread(command, "add", "alice", "--model", NAME, *etcd)
        key = added.stdout.strip()

        async def alice_gets_in() -> bool:
            return await status(key) == 200

        await eventually(alice_gets_in)
        # One that can't be used locks nobody out.
        discovery = Discovery(etcd_server.url, "default")
        await discovery.put("config/frontend/keys/bad", access_pb2.ApiKey(key_id="bad"))
        await discovery.put("config/frontend/keys/b", stored(key_id="misplaced"))
        listed = await asyncio.to_thread(
            command, "list", SWITCHGEAR_FRONTEND_ETCD_URL=etcd_server.url
        )
        assert json.loads(listed.stdout.splitlines()[0])["key_id"] == "alice"
        assert key not in listed.stdout
        assert "sha256" not in listed.stdout
        assert await status(key) == 200
        assert await status(GOOD) == 401
        await asyncio.to_thread(command, "remove", "alice", *etcd)

        async def alice_is_out() -> bool:
            return await status(key) == 401

        await eventually(alice_is_out)


async def test_before_the_keys_are_read_nobody_gets_in_and_hears_why(tmp_path: Path) -> None:
    unreachable = "http://127.0.0.1:1"
    async with (
        fake_router(says("ok")) as router,
        frontend(tmp_path, [router], api_keys="etcd", etcd_url=unreachable) as started,
    ):
        response = await started.client.get("/v1/models", headers=bearer(GOOD))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "API keys" in response.json()["error"]["message"]


def test_the_command_makes_lists_and_removes_keys_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def command(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "services.frontend", "keys", *arguments, "--file", str(path)],
            capture_output=True,
            env=ENVIRONMENT,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == status, result.stderr
        return result

    key = command("add", "alice", "--tenant", "team", "--tokens-per-minute", "1000").stdout.strip()
    assert key.startswith("sk-switchgear-")
    assert key not in path.read_text()
    assert digest_of(key).hex() in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert "there is a key 'alice' already" in command("add", "alice", status=1).stderr
    assert "key_id is 'a/b'" in command("add", "a/b", status=1).stderr
    command("add", "bob")
    lines = [json.loads(line) for line in command("list").stdout.splitlines()]
    assert lines == [
        {"key_id": "alice", "tenant": "team", "tokens_per_minute": "1000"},
        {"key_id": "bob", "tenant": "bob"},
    ]
    command("remove", "alice")
    assert "there is no key 'alice'" in command("remove", "alice", status=1).stderr
    assert len(command("list").stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"host": "0.0.0.0"}, "--allow-open-access"),
        ({"host": "10.1.2.3"}, "--allow-open-access"),
        ({"api_keys": "/no/such/file"}, "/no/such/file"),
    ],
)
async def test_a_frontend_does_not_start_open_to_others_or_with_unusable_keys(
    settings: dict[str, str], problem: str
) -> None:
    parsed = FrontendSettings.model_validate(settings)
    with pytest.raises(ConfigError, match=problem):
        async with controlled_access(parsed, Discovery(parsed.etcd_url, "default")):
            pass


@pytest.mark.parametrize(
    "settings",
    [{}, {"host": "::1"}, {"host": "localhost"}, {"host": "0.0.0.0", "allow_open_access": True}],
)
async def test_loopback_is_open_and_others_when_told_so(settings: dict[str, object]) -> None:
    parsed = FrontendSettings.model_validate(settings)
    async with controlled_access(parsed, Discovery(parsed.etcd_url, "default")) as access:
        assert access.caller("") is ANYONE


@pytest.mark.parametrize(
    "keys",
    [
        '{"keys": [{}]}',
        "[]",
        "{",
        json.dumps({"keys": [json_format.MessageToDict(stored())] * 2}),
        json.dumps({"keys": [{"keyId": "a", "tenant": "a", "keySha256": "abc"}]}),
        json.dumps({"keys": [json_format.MessageToDict(stored()) | {"tenant": "a/b"}]}),
        json.dumps({"keys": [json_format.MessageToDict(stored()) | {"limit": 3}]}),
    ],
)
async def test_a_file_with_a_mistake_stops_the_start(tmp_path: Path, keys: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(keys)
    parsed = FrontendSettings(api_keys=str(path))
    with pytest.raises(ConfigError, match="api_keys: "):
        async with controlled_access(parsed, Discovery(parsed.etcd_url, "default")):
            pass


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0151, "16ms"), (1, "1s"), (59.2, "1m0s"), (3601, "60m1s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


async def test_grpc_calls_carry_the_key_in_their_metadata(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(
            tmp_path,
            stored(requests_per_minute=1),
            stored(OTHER, "other", models=["x"]),
            router=router,
        ) as started,
        calling(started) as channel,
    ):
        stub = InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(model=NAME, text="a")

        async def refused(key: str | None) -> tuple[grpc.StatusCode, str]:
            metadata = [("authorization", f"Bearer {key}")] if key else []
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Generate(request, metadata=metadata).read()
            status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]
            assert status is not None
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            if raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                retry = error_details_pb2.RetryInfo()
                assert status.details[1].Unpack(retry)
                assert 30 < retry.retry_delay.seconds <= 60
            return raised.value.code(), info.reason

        unauthenticated = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert await refused(None) == unauthenticated
        assert await refused("wrong") == unauthenticated
        assert await refused(OTHER) == (grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ListModels(inference_pb2.ListModelsRequest())
        metadata = [("authorization", f"Bearer {GOOD}")]
        answer = [part async for part in stub.Generate(request, metadata=metadata)]
        assert "".join(part.text for part in answer) == "ok"
        exhausted = (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUESTS_LIMITED")
        assert await refused(GOOD) == exhausted
        listed = await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
        assert [model.model for model in listed.models] == [NAME]


async def test_the_official_client_hears_what_it_expects(tmp_path: Path) -> None:
    async with (
        fake_router(says("ok")) as router,
        guarded(
            tmp_path,
            stored(requests_per_minute=1),
            stored(OTHER, "other", models=["x"]),
            router=router,
        ) as started,
    ):

        async def ask(key: str) -> object:
            async with openai.AsyncOpenAI(
                base_url=f"{started.url}/v1", api_key=key, max_retries=0
            ) as client:
                return await client.completions.create(model=NAME, prompt="a")

        with pytest.raises(openai.AuthenticationError):
            await ask("wrong")
        with pytest.raises(openai.PermissionDeniedError):
            await ask(OTHER)
        await ask(GOOD)
        with pytest.raises(openai.RateLimitError):
            await ask(GOOD)
