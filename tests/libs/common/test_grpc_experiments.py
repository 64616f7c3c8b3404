"""How gRPC reads sockets in our services."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from services.decode_worker import __main__ as decode_worker
from services.frontend import __main__ as frontend
from services.kv_indexer import __main__ as kv_indexer
from services.prefill_worker import __main__ as prefill_worker
from services.router import __main__ as router


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own: gRPC looks at its settings once."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("GRPC_EXPERIMENTS", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_grpc_knows_the_experiments_that_are_turned_off() -> None:
    done = run("import libs.common, grpc; grpc.insecure_channel('127.0.0.1:1').close()")
    assert "experiment" not in done.stderr


@pytest.mark.parametrize(
    "service",
    [each.__name__ for each in (decode_worker, frontend, kv_indexer, prefill_worker, router)],
)
def test_a_service_says_how_to_read_before_grpc_is_imported(service: str) -> None:
    done = run(
        f"import sys, {service}; modules = list(sys.modules);"
        "print(modules.index('libs.common') < modules.index('grpc'))"
    )
    assert done.stdout == "True\n"
