"""Load from wrk, an HTTP load generator in C that leaves the processor to what is measured."""

import asyncio
import shutil
import subprocess
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from pydantic import BaseModel, ConfigDict

from benchmarks.serving.scenarios import Body

_SCRIPT = Path(__file__).with_name("load.lua")
# Longer than any answer may take, so that slow answers count as slow and not as failed.
_ANSWER_TIMEOUT_SECONDS = 60
_END_TIMEOUT_SECONDS = 30.0


class LoadError(Exception):
    """wrk is missing or did not do its work."""


class WrkOutcome(BaseModel):
    """What wrk's script prints at the end."""

    model_config = ConfigDict(frozen=True)

    answers_by_tenth: dict[int, int]
    """Whole answers with status 200, by the tenth of a second since 1970 in which they ended."""
    requests: int
    """Answers received whole, refusals included."""
    status_errors: int
    """Answers with a status of 400 or more."""
    socket_errors: int
    timeouts: int
    latency_p50_us: int
    latency_p99_us: int

    def answers_between(self, first_tenth: int, end_tenth: int) -> int:
        """Those that ended from the first tenth on and before the other one."""
        tenths = range(first_tenth, end_tenth)
        return sum(count for tenth, count in self.answers_by_tenth.items() if tenth in tenths)


def version() -> str:
    """Raises LoadError when there is no wrk."""
    if shutil.which("wrk") is None:
        raise LoadError("wrk is not installed: apt-get install wrk")
    # It prints its usage after the version, and fails.
    shown = subprocess.run(
        ["wrk", "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    return shown.stdout.split("Copyright")[0].strip()


async def run_wrk(
    url: str, body: Body, *, clients: int, duration_seconds: float
) -> tuple[WrkOutcome, float]:
    """Loads `url` for so long. Returns the outcome and the CPU seconds that wrk itself took.

    Requests that are in progress at the end are abandoned. Raises LoadError.
    """
    with tempfile.TemporaryDirectory(prefix="switchgear-bench-") as folder:
        halves = [Path(folder) / "before", Path(folder) / "after"]
        halves[0].write_text(body.before_id)
        halves[1].write_text(body.after_id)
        command = ["wrk", "--threads", "1", "--connections", str(clients)]
        command += ["--duration", f"{duration_seconds:.0f}s"]
        command += ["--timeout", f"{_ANSWER_TIMEOUT_SECONDS}s", "--script", str(_SCRIPT)]
        command += [url, "--", *map(str, halves)]
        before = getrusage(RUSAGE_CHILDREN)
        output = await _output(command, duration_seconds + _END_TIMEOUT_SECONDS)
        after = getrusage(RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return parse_outcome(output), cpu_seconds


def parse_outcome(output: str) -> WrkOutcome:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise LoadError(f"wrk printed no outcome: {output.strip()[-500:]}")
    return WrkOutcome.model_validate_json(lines[-1])


async def _output(command: list[str], timeout_seconds: float) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        raise LoadError(f"wrk did not end within {timeout_seconds:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace")
