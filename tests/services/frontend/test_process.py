"""The frontend as a process of its own, with a real etcd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from libs.common.discovery import Discovery
from switchgear.discovery.v1 import discovery_pb2
from tests.fixtures.eventually import WAIT_SECONDS, eventually, until
from tests.fixtures.servers import ServerProcess, free_port
from tests.services.frontend import byte_model
from tests.services.frontend.byte_model import NAME
from tests.services.frontend.fake_router import LENGTH, Call, fake_router
from tests.services.frontend.frontends import WORKER_ID, file_server

STOP_SECONDS = 20
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@asynccontextmanager
async def process(
    etcd: ServerProcess, folder: Path, name: str, port: int, **settings: str
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A frontend process; killed at the end if it still runs."""
    options = {
        "name": name,
        "etcd-url": etcd.url,
        "http-port": str(port),
        "cache-folder": str(folder),
        "drain-seconds": str(WAIT_SECONDS),
        **{setting.replace("_", "-"): value for setting, value in settings.items()},
    }
    arguments = [f"--{option}={value}" for option, value in options.items()]
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(  # noqa: ASYNC220 - starting it takes no time
            [sys.executable, "-m", "services.frontend", *arguments],
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
        )
    try:
        yield started
    finally:
        started.kill()
        await asyncio.to_thread(started.wait, STOP_SECONDS)


async def test_processes_share_a_port_serve_and_drain(
    etcd_server: ServerProcess, tmp_path: Path
) -> None:
    finishing = asyncio.Event()

    async def behave(call: Call) -> None:
        call.send(byte_model.tokens("begin"), starts=True)
        await finishing.wait()
        call.send(byte_model.tokens(" end"), LENGTH)

    port = free_port()
    discovery = Discovery(etcd_server.url, "default")
    async with (
        fake_router(behave) as router,
        file_server() as (_, worker),
        discovery.registered(router.instance),
        discovery.registered(worker, [byte_model.card(WORKER_ID)]),
        discovery.watching("instances/frontend/", discovery_pb2.Instance) as frontends,
        process(etcd_server, tmp_path, "frontend-0", port) as first,
        process(etcd_server, tmp_path, "frontend-1", port) as second,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        await until(lambda: len(frontends.entries) == 2)
        names = {instance.name for instance in frontends.values()}
        assert names == {"frontend-0", "frontend-1"}
        await until(lambda: len(router.sessions) == 2)

        async def is_ready() -> bool:
            return (await client.get("/health")).status_code == 200

        # Both have a router and a model soon after; what comes before is not of this test.
        await eventually(is_ready)

        body = {"model": NAME, "prompt": "Hi", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            assert "begin" in await anext(lines)
            for running in (first, second):
                running.send_signal(signal.SIGTERM)
            await until(lambda: not frontends.entries)
            finishing.set()
            rest = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(rest[0])["choices"][0]["text"] == " end"
        assert rest[-1] == "[DONE]"
        for running in (first, second):
            assert await asyncio.to_thread(running.wait, STOP_SECONDS) == 0


def test_a_wrong_setting_stops_the_process_by_name(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.frontend", "--max-attempts", "0"],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=STOP_SECONDS,
        check=False,
    )
    assert result.returncode == 2
    assert "--max-attempts (SWITCHGEAR_FRONTEND_MAX_ATTEMPTS) is '0'" in result.stderr


def test_a_process_that_would_be_open_to_others_unasked_does_not_start() -> None:
    arguments = ["--host", "0.0.0.0", "--advertise-host", "127.0.0.1", "--http-port", "0"]
    result = subprocess.run(
        [sys.executable, "-m", "services.frontend", *arguments],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=STOP_SECONDS,
        check=False,
    )
    assert result.returncode == 2
    assert "--allow-open-access" in result.stderr
