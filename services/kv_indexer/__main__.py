"""`python -m services.kv_indexer`, and `python -m services.kv_indexer verify`."""

import sys

from libs.common.tasks import run_service
from services.kv_indexer import verify
from services.kv_indexer.config import KvIndexerSettings
from services.kv_indexer.main import serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"]:
        sys.exit(verify.main(sys.argv[2:]))
    run_service("kv_indexer", KvIndexerSettings, serve)
