"""One process of a local cluster, and how to find it again after its launcher is gone.

Each process leads a session of its own: a signal meant for the launcher's terminal does not reach
it, and the children it leaves when it dies can still be found.
"""

import contextlib
import os
import signal

import psutil
from pydantic import BaseModel, ConfigDict

from deploy.local.probe import Probe

# The system's clock may be set while a process runs, and its creation time moves along.
_CREATION_TIME_TOLERANCE_SECONDS = 2.0


class ProcessSpec(BaseModel):
    """What to run, and how to tell that it is ready."""

    model_config = ConfigDict(frozen=True)

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}
    """Set on top of the launcher's own environment."""
    ports: dict[str, int] = {}
    """The ports that it was told to use, by what they are for: "grpc", "http", "metrics"..."""
    address: str = ""
    """Where to reach it, for people."""
    probes: tuple[Probe, ...] = ()
    """It is ready when all of them pass."""
    stage: int = 0
    """When to stop it: the highest stage goes first."""

    def failure(self) -> str | None:
        """Why it is not ready, in a few words; None when it is."""
        return next((failure for probe in self.probes if (failure := probe.failure())), None)


class RunningProcess(BaseModel):
    """A spec that was started, and the process it became. The process may have died since."""

    model_config = ConfigDict(frozen=True)

    spec: ProcessSpec
    pid: int
    created_at_seconds: float
    """Tells the process apart from a later one that was given the same pid."""

    @property
    def name(self) -> str:
        return self.spec.name

    def is_alive(self) -> bool:
        leader = self._pid_owner()
        return leader is not None and self._is_ours(leader) and _is_running(self.pid)

    def send(self, signal_number: signal.Signals) -> None:
        """Signals the process, not its children. Does nothing when it is dead."""
        if self.is_alive():
            _send(self.pid, signal_number)

    def session(self) -> list[int]:
        """The pids that still run of the process and all that it started and did not detach."""
        owner = self._pid_owner()
        if owner is not None and not self._is_ours(owner):
            # A stranger has the pid now. No pid is given out while a session is named by it, so
            # nothing of ours is left.
            return []
        return [pid for pid in psutil.pids() if _session_id(pid) == self.pid and _is_running(pid)]

    def kill_session(self) -> None:
        for pid in self.session():
            _send(pid, signal.SIGKILL)

    def _pid_owner(self) -> psutil.Process | None:
        try:
            return psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return None

    def _is_ours(self, owner: psutil.Process) -> bool:
        age = abs(owner.create_time() - self.created_at_seconds)
        return age < _CREATION_TIME_TOLERANCE_SECONDS


def _is_running(pid: int) -> bool:
    """A zombie has ended, whether or not its parent has taken note."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _send(pid: int, signal_number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)
