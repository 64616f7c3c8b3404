"""Fixtures for all tests."""

import os
from pathlib import Path

from hypothesis import settings

from tests.fixtures.servers import (
    etcd_server,
    jetstream_server,
    nats_server,
    start_etcd,
    start_nats,
)

__all__ = ["etcd_server", "jetstream_server", "nats_server", "start_etcd", "start_nats"]

# For processes that tests start.
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "build" / "proto")])

# How long an example takes says more of the machine than of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
