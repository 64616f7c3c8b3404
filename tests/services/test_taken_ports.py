"""A process that can't listen where it is told to says so, and ends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

NOWHERE = ("--etcd-url", "http://127.0.0.1:1")
WORKER = ("--engine", "sim", "--nats-url", "nats://127.0.0.1:1", "--model")


@pytest.mark.parametrize(
    ("component", "kind"),
    [
        *(("frontend", kind) for kind in ("http", "grpc", "metrics")),
        *(("router", kind) for kind in ("grpc", "metrics")),
        *(("kv_indexer", kind) for kind in ("grpc", "metrics")),
        *(("prefill_worker", kind) for kind in ("grpc", "metrics")),
        *(("decode_worker", kind) for kind in ("grpc", "metrics")),
    ],
)
def test_a_taken_port_is_named_with_its_setting_and_without_a_traceback(
    component: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [
                *(sys.executable, "-m", f"services.{component}", *NOWHERE),
                *(f"--{kind}-port", str(port)),
                *((*WORKER, str(tmp_path)) if component.endswith("worker") else ()),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    errors = [
        line for line in map(json.loads, ended.stderr.splitlines()) if line["level"] == "error"
    ]
    assert [(line["event"], line["error"]) for line in errors] == [
        ("port not available", f"can't listen on 127.0.0.1:{port}: Address already in use")
    ]
    variable = f"SWITCHGEAR_{component.upper()}_{kind.upper()}_PORT"
    assert errors[0]["setting"] == f"--{kind}-port ({variable})"
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1
