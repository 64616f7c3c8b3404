"""OpenAI's SDK for Node, with all cases. It is installed with npm, into the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.services.frontend.sdks.cases import (
    BY_NAME,
    CASES,
    NAMES,
    NODE_CLASSES,
    check,
    for_client,
    streamed,
)
from tests.services.frontend.sdks.installed import installed
from tests.services.frontend.sdks.scripted import Served
from tests.services.frontend.sdks.test_openai_python import KEYS

VERSION = "7.57.0"
INSTALL_SECONDS = 100
RUN_SECONDS = 60


def install(folder: Path) -> None:
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", ".", f"openai@{VERSION}"]
    done = subprocess.run(
        command, cwd=folder, timeout=INSTALL_SECONDS, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed: {done.stderr}")


@pytest.fixture(scope="module")
def outcomes(served: Served) -> dict[str, Any]:
    """Of all cases, which run side by side in one process."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is missing. Install Node.js 20 or later, which has both")
    told = {
        "cases": [for_client(case, "node") for case in CASES],
        "url": served.url,
        "keyed_url": served.keyed_url,
        "keys": KEYS,
    }
    sdk = installed(f"openai-node-{VERSION}", install)
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("runner.mjs")), str(sdk)],
        input=json.dumps(told),
        timeout=RUN_SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_node(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    if events := outcome.get("result", {}).get("events"):
        outcome = {"result": streamed(events)}
    check(for_client(BY_NAME[name], "node"), outcome, NODE_CLASSES)
