"""A set of processes that are started, watched and stopped together.

A process `router-0` has in the run folder:

    router-0.log   its stdout and stderr; a restart appends, and a start of everything begins anew
    router-0.log.1 that of the run before
    router-0.pid   its process id, for people and scripts
    router-0.json  all that it takes to find the process and to start it again exactly

The folder is the only truth. Whoever opens it can stop or restart what another has started.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from deploy.local.process import ProcessSpec, RunningProcess

STOP_GRACE_SECONDS = 10.0
_KILL_WAIT_SECONDS = 10.0
# Long enough for a whole cluster to be stopped by another command.
_LOCK_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 30


class ClusterError(Exception):
    """What a person asked for cannot be done, or went wrong. The message says why."""


class ProcessDied(ClusterError):
    """A process ended before it was ready."""

    def __init__(self, name: str, log_tail: str) -> None:
        super().__init__(f"{name} died while starting. The end of its log:\n\n{log_tail}")
        self.name = name


class LocalCluster:
    """The processes of one run folder.

    As a context manager it stops them at the end.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        # Only to reap them: a child's exit is seen by others through the process table.
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def processes(self) -> list[RunningProcess]:
        """All that were started and not stopped since, the dead ones included, in stage order."""
        self._reap()
        found: list[RunningProcess] = []
        for path in self.run_dir.glob("*.json"):
            # Another command may be stopping it at this moment.
            with contextlib.suppress(FileNotFoundError):
                found.append(RunningProcess.model_validate_json(path.read_text()))
        return sorted(found, key=lambda process: (process.spec.stage, process.name))

    def process(self, name: str) -> RunningProcess:
        known = {process.name: process for process in self.processes()}
        if name not in known:
            raise ClusterError(f"no process {name!r} here, only: {', '.join(known) or 'none'}")
        return known[name]

    def log_path(self, name: str) -> Path:
        return self.run_dir / f"{name}.log"

    def log_tail(self, name: str, lines: int = _TAIL_LINES) -> str:
        text = self.log_path(name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def refuse_if_running(self) -> None:
        """Raises ClusterError when anything of an earlier start still runs."""
        if any(process.session() for process in self.processes()):
            raise ClusterError(
                f"a deployment is already running in {self.run_dir}; stop it first (make down)"
            )

    def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Starts all of them at once, in a run folder without data. Does not wait until they are
        ready. Logs of the run before are kept, those before them are not.

        Raises ClusterError when processes of an earlier start still run, or one cannot be started.
        """
        with self._exclusive():
            self.refuse_if_running()
            self._empty_run_dir()
            try:
                for spec in specs:
                    self._spawn(spec)
            except OSError as error:
                self._stop(grace_seconds=0.0)
                raise ClusterError(f"cannot start {spec.name}: {error}") from error

    def wait_ready(
        self, timeout_seconds: float, report: Callable[[set[str]], None] = lambda ready: None
    ) -> None:
        """Returns when every process is ready, telling `report` again and again which ones are.

        Raises ProcessDied as soon as one has ended, ClusterError when the time is up.
        """
        self._wait_ready(self.processes(), timeout_seconds, report)

    def kill(self, name: str, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Signals one process, as a person would by hand. It is not started again."""
        self.process(name).send(signal_number)

    def restart(self, name: str, timeout_seconds: float) -> RunningProcess:
        """Starts the process anew, dead or alive, as it was first started. Returns when ready."""
        with self._exclusive():
            [new] = self._replace([self.process(name).spec])
        self._wait_ready([new], timeout_seconds, lambda ready: None)
        return new

    def replace(self, specs: Sequence[ProcessSpec], timeout_seconds: float) -> None:
        """Stops the processes of these names together, dead or alive, and starts these in their
        place. Returns when all are ready."""
        with self._exclusive():
            new = self._replace(specs)
        self._wait_ready(new, timeout_seconds, lambda ready: None)

    def _replace(self, specs: Sequence[ProcessSpec]) -> list[RunningProcess]:
        self._stop_together([self.process(spec.name) for spec in specs], STOP_GRACE_SECONDS)
        return [self._spawn(spec) for spec in specs]

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stops everything, last stage first, and forgets it. Fine to repeat.

        Each stage has `grace_seconds` to end by itself after SIGTERM. Then its sessions are killed,
        and so are children that outlived their parent.
        """
        if self.run_dir.is_dir():
            with self._exclusive():
                self._stop(grace_seconds)

    def _stop(self, grace_seconds: float) -> None:
        processes = self.processes()
        for stage in sorted({process.spec.stage for process in processes}, reverse=True):
            members = [process for process in processes if process.spec.stage == stage]
            self._stop_together(members, grace_seconds)

    def _stop_together(self, processes: list[RunningProcess], grace_seconds: float) -> None:
        for process in processes:
            process.send(signal.SIGTERM)
        kill_at = time.monotonic() + grace_seconds
        left = list(processes)
        while left:
            now = time.monotonic()
            if now > kill_at + _KILL_WAIT_SECONDS:
                raise ClusterError(f"cannot kill {', '.join(process.name for process in left)}")
            for process in left:
                if now > kill_at or not process.is_alive():
                    process.kill_session()
            for process in [process for process in left if not process.session()]:
                self._forget(process)
                left.remove(process)
            self._reap()
            if left:
                time.sleep(_POLL_SECONDS)

    def _wait_ready(
        self,
        processes: list[RunningProcess],
        timeout_seconds: float,
        report: Callable[[set[str]], None],
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        waiting = {process.name: "not asked yet" for process in processes}
        while waiting:
            for process in processes:
                if not process.is_alive():
                    raise ProcessDied(process.name, self.log_tail(process.name))
                if process.name in waiting:
                    failure = process.spec.failure()
                    if failure is None:
                        del waiting[process.name]
                    else:
                        waiting[process.name] = failure
            report({process.name for process in processes} - waiting.keys())
            if waiting and time.monotonic() > deadline:
                reasons = "\n".join(f"  {name}: {reason}" for name, reason in waiting.items())
                raise ClusterError(f"not ready after {timeout_seconds:.0f} s:\n{reasons}")
            time.sleep(_POLL_SECONDS)

    def _spawn(self, spec: ProcessSpec) -> RunningProcess:
        with self.log_path(spec.name).open("ab") as log:
            child = subprocess.Popen(
                spec.command,
                cwd=self.run_dir,
                env=os.environ | spec.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        process = RunningProcess(
            spec=spec, pid=child.pid, created_at_seconds=psutil.Process(child.pid).create_time()
        )
        self._remember(process)
        return process

    def _remember(self, process: RunningProcess) -> None:
        (self.run_dir / f"{process.name}.pid").write_text(f"{process.pid}\n")
        # Others read the folder at any time, so the record appears whole.
        unfinished = self.run_dir / f"{process.name}.json.new"
        unfinished.write_text(process.model_dump_json(indent=1))
        unfinished.rename(self.run_dir / f"{process.name}.json")

    def _forget(self, process: RunningProcess) -> None:
        for suffix in ("pid", "json"):
            (self.run_dir / f"{process.name}.{suffix}").unlink(missing_ok=True)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    def _empty_run_dir(self) -> None:
        for pattern in ("*.json", "*.pid", "*.log.1"):
            for path in self.run_dir.glob(pattern):
                path.unlink()
        for path in self.run_dir.glob("*.log"):
            path.rename(path.with_name(f"{path.name}.1"))
        for path in self.run_dir.glob("*.data"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One command at a time changes the cluster. The lock goes when its holder does."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        with (self.run_dir / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ClusterError(
                            f"another command has been changing {self.run_dir} for long"
                        ) from None
                time.sleep(_POLL_SECONDS)
            yield
