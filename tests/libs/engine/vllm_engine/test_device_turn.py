"""Engines that share a GPU are loaded one after the other."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from libs.engine.vllm_engine.device_turn import TurnNotGiven, device_turn, lock_file

HOLD = """
import sys, threading
from pathlib import Path
from libs.engine.vllm_engine.device_turn import device_turn
with device_turn(Path(sys.argv[1]), threading.Event()):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu.lock"


def test_the_next_has_its_turn_when_the_one_before_is_done(path: Path) -> None:
    order: list[str] = []

    def load_next() -> None:
        with device_turn(path, threading.Event()):
            order.append("next")

    with ThreadPoolExecutor(1) as pool:
        with device_turn(path, threading.Event()):
            waiting = pool.submit(load_next)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            order.append("first")
        waiting.result(timeout=10)
    assert order == ["first", "next"]


def test_a_turn_ends_with_a_load_that_failed(path: Path) -> None:
    with pytest.raises(MemoryError), device_turn(path, threading.Event()):
        raise MemoryError
    with device_turn(path, threading.Event(), timeout_seconds=0):
        pass


def test_who_is_told_to_close_waits_no_longer(path: Path) -> None:
    closing = threading.Event()
    closing.set()
    with (
        device_turn(path, threading.Event()),
        pytest.raises(TurnNotGiven, match="told to close"),
        device_turn(path, closing),
    ):
        pass


def test_others_that_load_for_too_long_are_named(path: Path) -> None:
    with (
        device_turn(path, threading.Event()),
        pytest.raises(TurnNotGiven, match=r"others have held .*gpu\.lock"),
        device_turn(path, threading.Event(), timeout_seconds=0),
    ):
        pass


def test_the_turn_of_a_killed_process_is_over(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(TurnNotGiven),
            device_turn(path, threading.Event(), timeout_seconds=0),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
        with device_turn(path, threading.Event(), timeout_seconds=0):
            pass


@pytest.mark.parametrize("devices", ["0", "0,1", "MIG-GPU-a1/1/0"])
def test_engines_meet_where_they_see_the_same_gpus(tmp_path: Path, devices: str) -> None:
    seen = lock_file({"CUDA_VISIBLE_DEVICES": devices}, tmp_path)
    assert seen == lock_file({"CUDA_VISIBLE_DEVICES": devices}, tmp_path)
    assert seen.parent == tmp_path
    assert seen != lock_file({"CUDA_VISIBLE_DEVICES": "2"}, tmp_path)
    assert seen != lock_file({}, tmp_path)
