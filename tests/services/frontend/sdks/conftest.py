"""One server for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.frontend.sdks.scripted import Served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("served"))
    yield running
    running.close()
