"""Runs in the engine core's process: ties its life to the worker's, and installs `grammars`.

vLLM leaves the engine core running, with the device's memory, when the process that started it is
killed. The kernel can end it instead.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Any

from libs.engine.vllm_engine import grammars

_PR_SET_PDEATHSIG = 1


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's entry point of the engine core, in a process that dies with its parent."""
    _die_with_parent()
    from vllm.v1.engine.core import EngineCoreProc

    grammars.install()
    EngineCoreProc.run_engine_core(*args, **kwargs)


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        raise SystemExit("the worker died while its engine core was being started")
