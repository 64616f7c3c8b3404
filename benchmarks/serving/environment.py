"""What the results were measured on."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from benchmarks.serving import load
from benchmarks.serving.results import Machine
from deploy.local.topology import REPOSITORY


def machine() -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release().split('-')[0]}",
    )


def versions() -> dict[str, str]:
    """Raises LoadError when there is no wrk."""
    return {
        **versions_without_wrk(),
        "wrk": load.version().removeprefix("wrk ").split(" ")[0],
    }


def versions_without_wrk() -> dict[str, str]:
    """Of what runs here besides the load generator."""
    return {
        "Python": platform.python_version(),
        "grpcio": metadata.version("grpcio"),
        "ai-dynamo": dynamo_version(),
        "smg": _installed(".venv-smg", "smg"),
    }


def commit() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}+changes" if _git("status", "--porcelain") else head


def _git(*arguments: str) -> str:
    finished = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    return finished.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def dynamo_version() -> str:
    """Of the Dynamo in its environment; "none" without one."""
    return _installed(".venv-dynamo", "ai_dynamo")


def _installed(environment: str, package: str) -> str:
    found = list((REPOSITORY / environment).glob(f"lib/*/site-packages/{package}-*.dist-info"))
    return found[0].name.removeprefix(f"{package}-").removesuffix(".dist-info") if found else "none"
