"""Responses that are kept: conversations go on, through any frontend, for their tenant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.discovery import Discovery
from services.frontend.openai.errors import ApiError
from services.frontend.openai.stored_responses import page_of
from tests.fixtures.eventually import eventually
from tests.fixtures.servers import ServerProcess, free_port
from tests.services.frontend import byte_model
from tests.services.frontend.byte_model import NAME, TOKENIZER
from tests.services.frontend.fake_router import STOP, Call, fake_router
from tests.services.frontend.frontends import WORKER_ID, Frontend, file_server, frontend
from tests.services.frontend.stored_keys import GOOD, stored, write
from tests.services.frontend.test_access import OTHER, bearer
from tests.services.frontend.test_process import process

UNKNOWN = "resp-" + "0" * 32


class Prompts:
    """A router's behaviour that remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, call: Call) -> None:
        self.seen.append(TOKENIZER.decode(list(call.generation.token_ids)))
        call.send(byte_model.tokens(f"Answer {len(self.seen)}"), starts=True)
        call.send([byte_model.END_TOKEN], STOP)


@asynccontextmanager
async def frontends(
    folder: Path, nats: ServerProcess, prompts: Prompts, number: int = 1, **settings: Any
) -> AsyncIterator[list[Frontend]]:
    """Frontends that keep responses, and have done so before."""
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(fake_router(prompts))
        options = {"response_store": "nats", "nats_url": nats.url} | settings
        started = [
            await stack.enter_async_context(frontend(folder / str(place), [router], **options))
            for place in range(number)
        ]
        for one in started:

            async def is_there(one: Frontend = one) -> bool:
                path = f"/v1/responses/{UNKNOWN}"
                answer = await one.client.get(path, headers=bearer(GOOD))
                return answer.status_code == 404

            await eventually(is_there)
        yield started


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={"model": NAME, "input": "Hi"} | fields)


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


async def texts_of(client: httpx.AsyncClient, response_id: str) -> list[str]:
    """What a response was given, in order."""
    found = await client.get(f"/v1/responses/{response_id}/input_items", params={"order": "asc"})
    assert found.status_code == 200, found.text
    return [item["content"][0]["text"] for item in found.json()["data"]]


async def test_a_response_made_through_one_frontend_goes_on_through_another(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    prompts = Prompts()
    async with frontends(tmp_path, jetstream_server, prompts, 2) as (one, other):
        first = (await ask(one.client, input="One", instructions="Be brief.")).json()
        assert first["store"] is True
        assert first["previous_response_id"] is None
        second = await ask(other.client, input="Two", previous_response_id=first["id"])
        assert second.status_code == 200, second.text
        assert second.json()["previous_response_id"] == first["id"]
        third = await ask(one.client, input="Three", previous_response_id=second.json()["id"])
        assert await texts_of(other.client, third.json()["id"]) == [
            "One", "Answer 1", "Two", "Answer 2", "Three",
        ]  # fmt: skip
        for text in ("One", "Answer 1", "Two", "Answer 2", "Three"):
            assert text in prompts.seen[-1]
        # Instructions are of one response only.
        assert "Be brief." in prompts.seen[0]
        assert "Be brief." not in prompts.seen[1]


async def test_a_conversation_outlives_the_response_that_it_goes_on_from(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        first = (await ask(one.client, input="One")).json()
        second = (await ask(one.client, input="Two", previous_response_id=first["id"])).json()
        gone = await one.client.delete(f"/v1/responses/{first['id']}")
        assert gone.json() == {"id": first["id"], "object": "response", "deleted": True}
        assert (await one.client.get(f"/v1/responses/{first['id']}")).status_code == 404
        assert (await one.client.delete(f"/v1/responses/{first['id']}")).status_code == 404
        third = (await ask(one.client, input="Three", previous_response_id=second["id"])).json()
        texts = await texts_of(one.client, third["id"])
        assert texts == ["One", "Answer 1", "Two", "Answer 2", "Three"]


async def test_what_is_read_is_what_was_answered_streamed_or_whole(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        whole = (await ask(one.client)).json()
        assert (await one.client.get(f"/v1/responses/{whole['id']}")).json() == whole
        streamed = await ask(one.client, stream=True)
        last = json.loads(streamed.text.rstrip().rpartition("data: ")[2])
        assert last["type"] == "response.completed"
        assert last["response"]["store"] is True
        kept = await one.client.get(f"/v1/responses/{last['response']['id']}?stream=false")
        assert kept.json() == last["response"]


async def test_what_is_not_to_be_kept_is_not(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        first = (await ask(one.client)).json()
        second = (await ask(one.client, store=False, previous_response_id=first["id"])).json()
        assert second["store"] is False
        assert (await one.client.get(f"/v1/responses/{second['id']}")).status_code == 404


async def test_anothers_response_is_as_unknown_as_none(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    third = "sk-switchgear-third"
    write(keys, stored(), stored(OTHER, "other"), stored(third, "third", tenant="good"))
    async with frontends(tmp_path, jetstream_server, Prompts(), api_keys=str(keys)) as [one]:
        one.client.headers.update(bearer(GOOD))
        made = (await ask(one.client)).json()["id"]
        for headers, response_id in ((bearer(OTHER), made), (bearer(GOOD), UNKNOWN)):
            path = f"/v1/responses/{response_id}"
            for answer in (
                await one.client.get(path, headers=headers),
                await one.client.delete(path, headers=headers),
                await one.client.get(f"{path}/input_items", headers=headers),
                await one.client.post(f"{path}/cancel", headers=headers),
            ):
                assert answer.status_code == 404
                assert answer.json()["error"] == {
                    "message": f"Response with id '{response_id}' not found.",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": None,
                }
            body = {"model": NAME, "input": "Hi", "previous_response_id": response_id}
            answer = await one.client.post("/v1/responses", json=body, headers=headers)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "previous_response_not_found"
            assert answer.json()["error"]["param"] == "previous_response_id"
        # A tenant's other keys are the same tenant.
        answer = await one.client.get(f"/v1/responses/{made}", headers=bearer(third))
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "?stream=true", "stream"),
        ("GET", "?starting_after=3", "starting_after"),
        ("GET", "?include=web_search_call.results", "include"),
        ("GET", "?whatever=1", "whatever"),
        ("GET", "/input_items?limit=0", "limit"),
        ("GET", "/input_items?limit=101", "limit"),
        ("GET", "/input_items?limit=many", "limit"),
        ("GET", "/input_items?order=up", "order"),
        ("GET", "/input_items?after=msg_none", "after"),
        ("POST", "/cancel", None),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(
    jetstream_server: ServerProcess, tmp_path: Path, method: str, path: str, param: str | None
) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        made = (await ask(one.client)).json()["id"]
        answer = await one.client.request(method, f"/v1/responses/{made}{path}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("field", ["background", "conversation"])
async def test_other_ways_to_keep_things_are_refused_by_name(
    jetstream_server: ServerProcess, tmp_path: Path, field: str
) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        answer = await ask(one.client, **{field: True})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_parameter"
        assert answer.json()["error"]["param"] == field


async def test_calls_their_results_and_reasoning_go_on_with_the_conversation(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}], "id": "msg_1"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "msg_1"},
        {"type": "function_call_output", "call_id": "c1", "output": "4 C"},
    ]
    async with frontends(tmp_path, jetstream_server, Prompts()) as [one]:
        made = (await ask(one.client, input=items)).json()["id"]
        after = (await ask(one.client, previous_response_id=made)).json()["id"]
        path = f"/v1/responses/{after}/input_items?order=asc"
        found = (await one.client.get(path)).json()["data"]
        kinds = [item["type"] for item in found]
        assert kinds == [
            "message", "reasoning", "function_call", "function_call_output", "message", "message",
        ]  # fmt: skip
        assert [item.get("role") for item in found if item["type"] == "message"] == [
            "user", "assistant", "user",
        ]  # fmt: skip
        assert len({item["id"] for item in found}) == len(found)
        assert found[0]["id"] == "msg_1"


async def test_while_the_store_is_away_only_what_needs_it_is_refused(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    prompts = Prompts()
    async with frontends(tmp_path, jetstream_server, prompts) as [one]:
        made = (await ask(one.client)).json()["id"]
        jetstream_server.stop()
        path = f"/v1/responses/{made}"
        for answer in (
            await ask(one.client, previous_response_id=made),
            await ask(one.client, store=True),
            await ask(one.client, store=True, stream=True),
            await one.client.get(path),
            await one.client.delete(path),
            await one.client.get(f"{path}/input_items"),
        ):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "responses_unavailable"
            assert answer.headers["retry-after"] == "1"
        # Nobody had to generate for that.
        assert len(prompts.seen) == 1
        for fields in ({}, {"store": False}):
            answer = await ask(one.client, **fields)
            assert answer.status_code == 200
            assert answer.json()["store"] is False

        jetstream_server.start()

        async def is_back() -> bool:
            return (await one.client.get(path)).status_code == 200

        await eventually(is_back)
        assert (await ask(one.client, previous_response_id=made, store=True)).status_code == 200


async def test_who_is_over_a_limit_is_refused_before_the_store_is_asked(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    write(keys, stored(), stored(OTHER, "other", requests_per_minute=1))
    async with frontends(tmp_path, jetstream_server, Prompts(), api_keys=str(keys)) as [one]:
        one.client.headers.update(bearer(OTHER))
        jetstream_server.stop()
        asked = await ask(one.client, previous_response_id=UNKNOWN)
        assert asked.status_code == 503
        refused = await ask(one.client, previous_response_id=UNKNOWN)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "requests"
        assert one.metric("in_flight_requests") == 0


async def test_a_store_that_goes_away_while_a_response_is_made_costs_no_answer(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    class StopsTheStore(Prompts):
        async def __call__(self, call: Call) -> None:
            await asyncio.to_thread(jetstream_server.stop)
            await super().__call__(call)

    async with frontends(tmp_path, jetstream_server, StopsTheStore()) as [one]:
        answer = await ask(one.client, store=True)
        assert answer.status_code == 200, answer.text
        assert answer.json()["store"] is False
        assert answer.json()["output"][0]["content"][0]["text"] == "Answer 1"


async def test_what_is_too_large_to_be_kept_is_refused_or_answered_only(
    jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    prompts = Prompts()
    limit = {"stored_response_bytes": 1800}
    async with frontends(tmp_path, jetstream_server, prompts, **limit) as [one]:
        large = "x" * 1850
        refused = await ask(one.client, input=large, store=True)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "store"
        assert "1800 bytes" in refused.json()["error"]["message"]
        assert prompts.seen == []
        answered = await ask(one.client, input=large)
        assert answered.json()["store"] is False
        assert (await ask(one.client, input="x", store=True)).json()["store"] is True


async def test_responses_expire(jetstream_server: ServerProcess, tmp_path: Path) -> None:
    async with frontends(tmp_path, jetstream_server, Prompts(), stored_response_seconds=1) as [one]:
        made = (await ask(one.client)).json()["id"]

        async def is_gone() -> bool:
            return (await one.client.get(f"/v1/responses/{made}")).status_code == 404

        await eventually(is_gone)
        answer = await ask(one.client, previous_response_id=made)
        assert answer.json()["error"]["code"] == "previous_response_not_found"


async def test_without_a_store_there_are_no_such_paths(tmp_path: Path) -> None:
    async with fake_router(Prompts()) as router, frontend(tmp_path, [router]) as one:
        assert (await one.client.get(f"/v1/responses/{UNKNOWN}")).status_code == 404
        answer = await ask(one.client, previous_response_id=UNKNOWN)
        assert answer.json()["error"]["code"] == "unsupported_parameter"
        assert (await ask(one.client)).json()["store"] is False


async def test_a_conversation_outlives_the_process_that_it_began_with(
    etcd_server: ServerProcess, jetstream_server: ServerProcess, tmp_path: Path
) -> None:
    settings = {"response_store": "nats", "nats_url": jetstream_server.url}
    ports = [free_port(), free_port()]
    discovery = Discovery(etcd_server.url, "default")
    async with (
        fake_router(Prompts()) as router,
        file_server() as (_, worker),
        discovery.registered(router.instance),
        discovery.registered(worker, [byte_model.card(WORKER_ID)]),
        process(etcd_server, tmp_path, "frontend-0", ports[0], **settings) as first,
        process(etcd_server, tmp_path, "frontend-1", ports[1], **settings),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30) as one,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[1]}", timeout=30) as other,
    ):
        for client in (one, other):
            await eventually(partial(is_ready, client))
        made = await ask(one, input="One", store=True)
        assert made.status_code == 200, made.text
        first.kill()
        went_on = await ask(other, input="Two", previous_response_id=made.json()["id"])
        assert went_on.status_code == 200, went_on.text
        texts = await texts_of(other, went_on.json()["id"])
        assert texts == ["One", "Answer 1", "Two"]


@given(st.integers(0, 60), st.integers(1, 100), st.booleans())
def test_pages_one_after_another_have_all_items_once(
    number: int, limit: int, is_ascending: bool
) -> None:
    items = [{"id": f"msg_{place}"} for place in range(number)]
    found: list[dict[str, Any]] = []
    after = None
    while True:
        page = page_of(items, limit=limit, is_ascending=is_ascending, after=after)
        found += page["data"]
        assert len(page["data"]) == min(limit, number - len(found) + len(page["data"]))
        if not page["has_more"]:
            break
        assert page["first_id"] == page["data"][0]["id"]
        after = page["last_id"]
    assert found == (items if is_ascending else items[::-1])


def test_a_page_after_nobody_is_refused() -> None:
    with pytest.raises(ApiError):
        page_of([{"id": "a"}], limit=1, is_ascending=True, after="b")
