"""litellm, by way of chat completions and of Anthropic's messages.

It wants an older SDK of OpenAI's than the other tests have, and so gets an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.frontend.sdks.installed import installed
from tests.services.frontend.sdks.scripted import Served

PACKAGES = ("litellm==1.106.2", "mcp==2.3.0")
"""For tools litellm takes mcp, which it does not ask for."""
INSTALL_SECONDS = 100
RUN_SECONDS = 180


def install(folder: Path) -> None:
    for command in (
        ["venv", "--python", sys.executable, str(folder)],
        ["pip", "install", "--python", str(folder / "bin" / "python"), *PACKAGES],
    ):
        subprocess.run(
            [sys.executable, "-m", "uv", "--quiet", *command], check=True, timeout=INSTALL_SECONDS
        )


@pytest.mark.timeout(INSTALL_SECONDS * 2 + RUN_SECONDS)
def test_litellm(served: Served) -> None:
    python = installed("-".join(PACKAGES), install) / "bin" / "python"
    calls = Path(__file__).with_name("litellm_calls.py")
    # Else it asks the internet what models cost.
    environment = {"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [python, str(calls), served.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "answer": "Hello",
        "stream": "Hello there",
        "async": "async",
        "tool": '{"a": 1}',
        "anthropic": "Hello",
        "anthropic stream": "Hello",
        "embeddings": [2, 5],
        "unknown": "NotFoundError",
        "busy": "RateLimitError",
    }
