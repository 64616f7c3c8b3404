"""A worker from its start on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from libs.common.config import ConfigError
from libs.common.tasks import background
from libs.engine.interface import EngineInfo, EngineSink
from libs.engine.sim.engine import SimEngine
from libs.engine.sim.settings import SimSettings
from libs.worker import serve
from services.prefill_worker import main
from services.prefill_worker.config import PrefillWorkerSettings

# The decode worker as it is, but for its engine.
WORKER_WITH_A_DYING_ENGINE = """
import runpy
from libs.engine.sim.engine import SimEngine

async def step(*arguments):
    raise RuntimeError("out of smoke")

SimEngine._step_for_ever = step
runpy.run_module("services.decode_worker", run_name="__main__")
"""


class LoadingEngine(SimEngine):
    """Loads its model for as long as anybody waits."""

    def __init__(self) -> None:
        super().__init__(SimSettings())
        self.is_loading = asyncio.Event()
        self.is_closed = False

    async def start(self, sink: EngineSink) -> EngineInfo:
        self.is_loading.set()
        await asyncio.Event().wait()
        return await super().start(sink)

    async def close(self) -> None:
        self.is_closed = True
        await super().close()


async def test_a_worker_told_to_stop_while_its_engine_starts_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    engine, stop = LoadingEngine(), asyncio.Event()
    monkeypatch.setattr(serve, "make_engine", lambda settings, leg: engine)
    settings = PrefillWorkerSettings(engine="sim", model=tmp_path)
    async with asyncio.timeout(10), background(main.serve(settings, stop)) as serving:
        await engine.is_loading.wait()
        stop.set()
        await serving
    assert engine.is_closed


async def test_a_prefill_worker_can_not_embed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = PrefillWorkerSettings(engine="sim", model=tmp_path, task="embed")
    with pytest.raises(ConfigError, match="--task embed is for decode workers"):
        await main.serve(settings, asyncio.Event())


def test_a_dead_engine_ends_the_process_with_one_traceback_and_what_happens_next(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    nowhere = ("--etcd-url", "http://127.0.0.1:1", "--nats-url", "nats://127.0.0.1:1")
    ended = subprocess.run(
        [
            *(sys.executable, "-c", WORKER_WITH_A_DYING_ENGINE, "--name", "decode-7", *nowhere),
            *("--engine", "sim", "--model", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    [traceback] = [line for line in lines if "exception" in line]
    [last] = [line for line in lines if line["event"] == "service failed"]
    assert (traceback["event"], traceback["service"]) == ("engine died", "decode-7")
    assert "out of smoke" in traceback["exception"]
    assert "start it again" in last["error"]
    assert ended.returncode == 1
