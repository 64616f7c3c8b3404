"""Clients that are no part of the test environment, installed once into the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def installed(name: str, install: Callable[[Path], None]) -> Path:
    """The folder of that name, which `install` fills where it is not there yet.

    It appears when it is complete. `name` has the version, so that another one is another folder.
    """
    cache = os.environ.get("SWITCHGEAR_CACHE") or "~/.cache/switchgear"
    folder = Path(cache).expanduser() / "test-clients" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
        try:
            install(making)
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # Somebody else was faster.
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder
