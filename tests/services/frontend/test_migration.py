"""Requests whose workers and routers die under them: every token exactly once."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from libs.common.errors import InternalError, InvalidRequest, NoLiveInstance, WorkerLost
from switchgear.common.v1 import generation_pb2
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import NAME, tokens
from tests.services.frontend.fake_router import (
    LENGTH,
    Call,
    FakeRouter,
    fake_router,
    says,
    worker_id,
)
from tests.services.frontend.frontends import Frontend, frontend

PROMPT = "count: "
ANSWER = "".join(f"{number} é " for number in range(60))
ANSWER_TOKENS = tokens(ANSWER)


class Mortal:
    """Goes on with the answer from where the prompt ends, and dies as told."""

    def __init__(self, deaths: list[tuple[int, str]]) -> None:
        """For each attempt of each request: after how many tokens, and how."""
        self.deaths = deaths
        self.attempts: dict[str, int] = {}

    async def __call__(self, call: Call) -> None:
        attempt = self.attempts.get(call.generation.request_id, 0)
        self.attempts[call.generation.request_id] = attempt + 1
        worker = f"decode-{attempt}"
        produced = len(call.generation.token_ids) - len(tokens(PROMPT))
        assert call.generation.stopping.max_tokens == len(ANSWER_TOKENS) - produced
        after, how = self.deaths[attempt] if attempt < len(self.deaths) else (10_000, "")
        rest = ANSWER_TOKENS[produced:]
        call.route(worker)
        for index, token in enumerate(rest):
            if index == after:
                return self.die(call, how, worker)
            call.send([token], starts=index == 0)
            await asyncio.sleep(0)
        call.send([], LENGTH)
        return None

    def die(self, call: Call, how: str, worker: str) -> None:
        match how:
            case "failure":
                call.fail(WorkerLost("it died"), worker)
            case "engine":
                error = WorkerLost("the engine died")
                call.send([], generation_pb2.FINISH_REASON_ERROR, error=error)
            case "cancelled":
                call.send([], generation_pb2.FINISH_REASON_CANCELLED)
            case "router":
                call.session.end()


async def stream_text(started: Frontend) -> str:
    response = await started.complete(prompt=PROMPT, max_tokens=len(ANSWER_TOKENS), stream=True)
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n"), response.text[-500:]
    *events, _ = response.text.removesuffix("\n\n").split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


DEATHS = [
    [(after, how)]
    for how in ("failure", "engine", "cancelled", "router")
    for after in (0, 1, 7, 8, len(ANSWER_TOKENS) - 1)
] + [
    [(5, "router"), (5, "failure")],
    [(0, "engine"), (3, "router")],
    [(3, "failure"), (0, "failure")],
]


@pytest.mark.parametrize("deaths", DEATHS)
async def test_every_token_arrives_exactly_once(
    tmp_path: Path, deaths: list[tuple[int, str]]
) -> None:
    async with (
        fake_router(Mortal(deaths), "router-0") as first,
        fake_router(Mortal([]), "router-1") as second,
        frontend(tmp_path, [first, second]) as started,
    ):
        first.behaviour = second.behaviour = Mortal(deaths)
        await until(lambda: first.sessions and second.sessions)
        assert await stream_text(started) == ANSWER
        calls = sorted(first.calls + second.calls, key=lambda call: len(call.generation.token_ids))
        assert len(calls) == len(deaths) + 1
        assert len({call.generation.request_id for call in calls}) == 1
        excluded = {
            worker_id(f"decode-{i}") for i, (_, how) in enumerate(deaths) if how != "router"
        }
        assert any(set(call.submit.routing.excluded_instance_ids) == excluded for call in calls)


async def test_many_streams_survive_random_deaths(tmp_path: Path) -> None:
    chance = random.Random(7)

    class Fate(Mortal):
        async def __call__(self, call: Call) -> None:
            self.deaths = [
                (chance.randrange(len(ANSWER_TOKENS)), chance.choice(["failure", "engine"]))
            ] * chance.randrange(3)
            await super().__call__(call)

    async with (
        fake_router(Fate([]), "router-0") as first,
        fake_router(Fate([]), "router-1") as second,
        # A request may lose two workers, a router, and then be answered.
        frontend(tmp_path, [first, second], max_attempts=4) as started,
    ):
        second.behaviour = first.behaviour
        await until(lambda: first.sessions and second.sessions)
        streams = [asyncio.create_task(stream_text(started)) for _ in range(20)]
        await until(lambda: len(first.calls + second.calls) >= 20)
        first.break_sessions()
        assert await asyncio.gather(*streams) == [ANSWER] * 20
        assert started.metric("migrations_total", model=NAME, reason="WORKER_LOST") > 0


async def test_the_only_router_may_restart(tmp_path: Path) -> None:
    async def serve_and_die(call: Call) -> None:
        call.send(ANSWER_TOKENS[:10], starts=True)

    started_router: FakeRouter
    async with frontend(tmp_path) as started:
        async with fake_router(serve_and_die, "router-0") as started_router:
            started.list_instances(*started.instances.values(), started_router.instance)
            await started.until_ready()
            streaming = asyncio.create_task(stream_text(started))
            await until(lambda: started_router.calls)
            started_router.break_sessions()
        async with fake_router(Mortal([]), "again-0") as started_router:
            started.list_instances(started_router.instance)
            assert await streaming == ANSWER


async def test_a_request_that_lost_its_worker_waits_for_a_new_one(tmp_path: Path) -> None:
    refusals = 2

    async def behave(call: Call) -> None:
        nonlocal refusals
        if call.handle == 1:
            call.send(ANSWER_TOKENS[:3], starts=True)
            call.fail(WorkerLost("died"), "decode-0")
        elif refusals:
            refusals -= 1
            call.fail(NoLiveInstance("nobody yet"))
        else:
            await Mortal([])(call)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        with capture_logs() as logs:
            assert await stream_text(started) == ANSWER
        assert started.metric("migrations_total", model=NAME, reason="WORKER_LOST") == 1
        assert started.metric("migrations_total", model=NAME, reason="NO_LIVE_INSTANCE") == 0
        told = [entry["event"] for entry in logs if entry["event"].startswith("request ")]
        assert told == ["request migrates", "request waits for a worker"]


@pytest.mark.parametrize(
    ("error", "attempts", "code"),
    [
        (WorkerLost("died again"), 3, "worker_lost"),
        (InvalidRequest("no"), 1, "invalid_value"),
        (InternalError("bug"), 1, None),
    ],
)
async def test_the_client_hears_when_it_is_given_up(
    tmp_path: Path, error: WorkerLost, attempts: int, code: str | None
) -> None:
    async def behave(call: Call) -> None:
        call.fail(error, "decode-0")

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        response = await started.complete()
        assert response.status_code == error.http
        assert response.json()["error"]["code"] == code
        assert len(router.calls) == attempts


async def test_the_end_is_not_asked_for_twice_when_only_its_news_is_lost(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        call.send(tokens("1234"), starts=True)
        call.fail(WorkerLost("died just after"), "decode-0")

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(max_tokens=4)).json()
        assert body["choices"][0]["text"] == "1234"
        assert body["choices"][0]["finish_reason"] == "length"
        assert len(router.calls) == 1


async def test_a_stop_string_may_span_two_workers(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        if call.handle == 1:
            call.send(tokens("one S"), starts=True)
            call.fail(WorkerLost("died"), "decode-0")
        else:
            await says("TOP two")(call)

    async with fake_router(behave) as router, frontend(tmp_path, [router]) as started:
        body = (await started.complete(stop="STOP", max_tokens=50)).json()
        assert body["choices"][0]["text"] == "one "
        assert body["choices"][0]["finish_reason"] == "stop"
