"""The KV index's compiled core is of its sources, and missing only where it can't be built."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.topology import REPOSITORY
from services.kv_indexer.core.index import COMPILED_MODULE

SOURCES = REPOSITORY / "services" / "kv_indexer" / "core" / "native"


def environment_in(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def build(environment: Path, stamp: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SOURCES / "build.sh", environment, stamp],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(COMPILED_MODULE is None, reason="there is no C++ compiler")
def test_the_compiled_index_is_of_these_sources() -> None:
    assert COMPILED_MODULE is not None
    sources = [*sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cpp"))]
    checksum = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    assert checksum == COMPILED_MODULE.SOURCES, "run `make env`"


def test_where_there_is_no_compiler_an_earlier_index_goes_and_nothing_fails(tmp_path: Path) -> None:
    environment = environment_in(tmp_path / "environment")
    earlier = environment / "lib/python3.11/site-packages/switchgear_block_index.so"
    earlier.touch()
    before, stamp = environment / ".block_index-before", environment / ".block_index-after"
    before.touch()
    done = build(environment, stamp, CXX="no-such-compiler")
    assert (done.returncode, "no C++ compiler" in done.stderr) == (0, True)
    assert (earlier.exists(), before.exists(), stamp.exists()) == (False, False, True)


def test_an_index_that_does_not_compile_fails_and_is_built_again(tmp_path: Path) -> None:
    environment = environment_in(tmp_path / "environment")
    stamp = environment / ".block_index-after"
    assert build(environment, stamp, CXX="false").returncode != 0
    assert not stamp.exists()
