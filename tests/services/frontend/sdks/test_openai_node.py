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
def sdk() -> Path:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is missing. Install Node.js 20 or later, which has both")
    return installed(f"openai-node-{VERSION}", install)


def run(script: str, sdk: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What a script prints that is told this."""
    done = subprocess.run(
        ["node", str(Path(__file__).with_name(script)), str(sdk)],
        input=json.dumps(told),
        timeout=RUN_SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def outcomes(served: Served, sdk: Path) -> dict[str, Any]:
    """Of all cases, which run side by side in one process."""
    told = {
        "cases": [for_client(case, "node") for case in CASES],
        "url": served.url,
        "keyed_url": served.keyed_url,
        "keys": KEYS,
    }
    return run("runner.mjs", sdk, told)


@pytest.mark.parametrize("name", NAMES)
def test_node(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    if events := outcome.get("result", {}).get("events"):
        outcome = {"result": streamed(events)}
    check(for_client(BY_NAME[name], "node"), outcome, NODE_CLASSES)


def test_a_kept_conversation_is_gone_through_and_deleted(served: Served, sdk: Path) -> None:
    found = run("stored_responses.mjs", sdk, {"url": served.keyed_url, "key": KEYS["good"]})
    assert "Say: One" in found["second"]
    assert found["texts"] == ["Say: One", "One", "Prompt:", found["second"], "Say: Three"]
    assert found["retrieved"] == "Three"
    assert found["after_deletion"] == 404
