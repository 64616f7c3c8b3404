"""The workflows are what GitHub accepts."""

from __future__ import annotations

import subprocess
import sys

from deploy.delivery.__main__ import ROOT
from deploy.delivery.workflows import FOLDER


def test_workflows_are_valid_by_githubs_schema() -> None:
    files = sorted((ROOT / FOLDER).glob("*.yml"))
    assert len(files) > 5, "one for each service, and the one that they use"
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.github-workflows"),
            *files,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
