"""Fetches the files of models from workers, and keeps them."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from libs.common import logs
from libs.common.channels import Channels
from libs.common.errors import NoLiveInstance, SwitchgearError
from libs.common.identity import WORKER
from libs.common.model_files import checksum
from switchgear.worker.v1 import worker_pb2
from switchgear.worker.v1.worker_pb2_grpc import WorkerServiceStub

log = logs.get(__name__)

FETCH_SECONDS = 30
"""For all files of a model from one worker."""

MAX_FILES_BYTES = 256 << 20
"""The largest tokenizers have some tens of MB."""


class ModelFileStore:
    """Files by their checksum, on disk, so that a restart needs no worker for them."""

    def __init__(self, folder: Path, channels: Channels | None = None) -> None:
        self._folder = folder
        self._channels = channels or Channels()

    async def get(
        self, wanted_checksum: str, model: str, addresses: Iterable[str]
    ) -> dict[str, bytes]:
        """The files, from disk or from the first worker that gives them.

        Raises NoLiveInstance when no worker gives files of that checksum.
        """
        folder = self._folder / wanted_checksum
        if kept := await asyncio.to_thread(_read, folder, wanted_checksum):
            return kept
        for address in addresses:
            try:
                files = await _fetch(self._channels, address, model)
            except SwitchgearError as error:
                log.warning("model files not fetched", address=address, error=error.message)
                continue
            if checksum(files) != wanted_checksum:
                log.error("model files do not match the model card", address=address, model=model)
                continue
            try:
                await asyncio.to_thread(_write, folder, files)
            except OSError as error:
                log.warning("model files not kept", folder=str(folder), error=str(error))
            return files
        raise NoLiveInstance(f"no worker gives the tokenizer of {model}")


async def _fetch(channels: Channels, address: str, model: str) -> dict[str, bytes]:
    """Raises SwitchgearError."""
    files: dict[str, bytearray] = {}
    left_bytes = MAX_FILES_BYTES
    async with channels.calling(address, WORKER) as channel:
        async for piece in WorkerServiceStub(channel).GetModelFiles(
            worker_pb2.GetModelFilesRequest(model=model), timeout=FETCH_SECONDS
        ):
            left_bytes -= len(piece.data)
            if left_bytes < 0:
                raise NoLiveInstance(f"files of {model} exceed {MAX_FILES_BYTES} bytes")
            files.setdefault(piece.name, bytearray()).extend(piece.data)
    return {name: bytes(data) for name, data in files.items()}


def _read(folder: Path, wanted_checksum: str) -> dict[str, bytes] | None:
    """None when the folder is not there or not what it should be."""
    try:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    except OSError:
        return None
    if checksum(files) == wanted_checksum:
        return files
    log.warning("kept model files are damaged", folder=str(folder))
    return None


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Moves a finished folder into place, so that nobody sees half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder.parent) as scratch:
        made = Path(scratch) / "files"
        made.mkdir()
        for name, data in files.items():
            if Path(name).name != name:
                raise OSError(f"not a plain file name: {name!r}")
            (made / name).write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
