"""Which models are listed, and where their tokenizers come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from switchgear.discovery.v1 import discovery_pb2
from switchgear.discovery.v1.discovery_pb2 import ROLE_PREFILL_WORKER
from tests.fixtures.eventually import until
from tests.services.frontend.byte_model import CHECKSUM, FILES, NAME, card
from tests.services.frontend.frontends import Frontend, file_server, frontend

LACKS_DECODE = f"The model '{NAME}' is not ready: it lacks a decode worker"
LOADING = f"The model '{NAME}' is not ready: its tokenizer is being loaded"


async def listed(started: Frontend) -> list[str]:
    response = await started.client.get("/v1/models")
    data: list[dict[str, Any]] = response.json()["data"]
    return [model["id"] for model in data]


async def state_of(started: Frontend, model: str = NAME) -> str:
    """ "ready", or why not."""
    response = await started.client.get(f"/v1/models/{model}")
    if response.status_code == 404:
        return "unknown"
    described = response.json()
    assert described["ready"] == (described["not_ready_reason"] is None)
    return str(described["not_ready_reason"] or "ready")


async def test_a_model_comes_and_goes_with_its_workers(tmp_path: Path) -> None:
    async with file_server() as (_, worker), frontend(tmp_path, cards=[]) as started:
        assert (await listed(started), await state_of(started)) == ([], "unknown")

        started.list_instances(worker)
        started.list_cards(card(1, ROLE_PREFILL_WORKER))
        assert (await listed(started), await state_of(started)) == ([], LACKS_DECODE)

        started.list_cards(card(1, ROLE_PREFILL_WORKER), card(worker.instance_id))
        await until(lambda: started.models.served())
        assert (await listed(started), await state_of(started)) == ([NAME], "ready")

        started.list_cards(card(1, ROLE_PREFILL_WORKER))
        assert (await listed(started), await state_of(started)) == ([], LACKS_DECODE)

        started.list_cards()
        assert (await listed(started), await state_of(started)) == ([], "unknown")


async def test_several_models_and_their_aliases_are_listed(tmp_path: Path) -> None:
    async with file_server() as (_, worker), frontend(tmp_path, cards=[]) as started:
        started.list_instances(worker)
        started.list_cards(
            card(worker.instance_id, model="org/b", aliases=("b",)),
            card(worker.instance_id, model="a"),
        )
        await until(lambda: len(started.models.served()) == 2)
        assert await listed(started) == ["a", "org/b", "b"]
        assert (await state_of(started, "org/b"), await state_of(started, "b")) == (
            "ready",
            "ready",
        )


async def test_a_worker_whose_address_comes_later_still_gives_its_files(tmp_path: Path) -> None:
    async with file_server() as (_, worker), frontend(tmp_path, cards=[], workers=[]) as started:
        started.list_cards(card(worker.instance_id))
        assert await state_of(started) == LOADING
        started.list_instances(worker)
        await until(lambda: started.models.served())


async def test_files_are_taken_from_any_worker_that_has_the_right_ones(tmp_path: Path) -> None:
    async with (
        file_server({"tokenizer.json": b"other"}, 1) as (_, wrong),
        file_server(FILES, 2) as (_, right),
        frontend(tmp_path, cards=[], workers=[]) as started,
    ):
        gone = discovery_pb2.Instance(instance_id=3, address="127.0.0.1:1")
        started.list_instances(gone, wrong, right)
        started.list_cards(card(1), card(2), card(3))
        await until(lambda: started.models.served())


async def test_files_that_do_not_match_the_card_are_not_used(tmp_path: Path) -> None:
    async with (
        file_server({"tokenizer.json": b"{}"}) as (servicer, worker),
        frontend(tmp_path, cards=[], workers=[]) as started,
    ):
        started.list_instances(worker)
        started.list_cards(card(worker.instance_id))
        await until(lambda: servicer.calls)
        assert await state_of(started) == LOADING
        assert not os.path.exists(tmp_path / "tokenizers")  # noqa: ASYNC240


async def test_files_are_kept_on_disk_and_checked_there(tmp_path: Path) -> None:
    kept = tmp_path / "tokenizers" / CHECKSUM
    async with file_server() as (servicer, worker):

        async def serve_once() -> None:
            async with frontend(tmp_path, cards=[], workers=[worker]) as started:
                started.list_cards(card(worker.instance_id))
                await until(lambda: started.models.served())

        await serve_once()
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == FILES
        await serve_once()
        assert servicer.calls == 1
        (kept / "tokenizer.json").write_bytes(b"damaged")
        await serve_once()
        assert servicer.calls == 2
        assert (kept / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
