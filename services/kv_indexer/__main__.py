"""`python -m services.kv_indexer`."""

from libs.common.tasks import run_service
from services.kv_indexer.config import KvIndexerSettings
from services.kv_indexer.main import serve

if __name__ == "__main__":
    run_service("kv_indexer", KvIndexerSettings, serve)
