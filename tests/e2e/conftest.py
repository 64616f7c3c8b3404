from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import default_model


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """The default model without its weights, for simulated engines."""
    return default_model.tokenizer_folder(print)
