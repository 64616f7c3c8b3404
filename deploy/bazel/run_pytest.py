"""What Bazel starts for a file of tests: pytest, with its leavings where Bazel wants them."""

from __future__ import annotations

import os
import sys

import pytest


def main(arguments: list[str]) -> int:
    scratch = os.environ["TEST_TMPDIR"]
    os.environ["TMPDIR"] = scratch
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(scratch, "hypothesis")
    report = os.environ["XML_OUTPUT_FILE"]
    return pytest.main(
        ["-c", "pyproject.toml", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
