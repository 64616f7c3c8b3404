"""scripts/env.sh, with a stand-in for Python."""

import os
import subprocess
from pathlib import Path

from deploy.local.topology import REPOSITORY

# As it is asked by the script: for its version, for an environment, and there for packages, which
# takes until somebody writes to the pipe.
PYTHON = """#!/bin/sh
case "$*" in
-c*) echo 3.11 ;;
"-m venv"*) mkdir -p "$4/bin" && ln -s "$0" "$4/bin/python" ;;
*) read line < "$PIPE" && echo "$line" ;;
esac
"""


def test_while_packages_are_installed_it_is_said_again_and_again(tmp_path: Path) -> None:
    python, lock, pipe = tmp_path / "python", tmp_path / "lock.txt", tmp_path / "pipe"
    python.write_text(PYTHON)
    python.chmod(0o755)
    lock.write_text("a==1\nb==2\n")
    os.mkfifo(pipe)
    environment = tmp_path / "venv"
    command = [REPOSITORY / "scripts" / "env.sh", environment, lock, tmp_path / "stamp"]
    settings = {"PYTHON": str(python), "PIPE": str(pipe), "PROGRESS_SECONDS": "0.1"}
    with subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            pipe.write_text("installed\n")
            rest = process.stdout.read()
            status = process.wait(20)
        finally:
            process.kill()
    assert lines[0] == f"making {environment} from {lock} (2 packages)\n"
    assert all(line.startswith(f"still making {environment} (") for line in lines[1:])
    assert "installed" in rest
    assert status == 0
    assert (tmp_path / "stamp").exists()
