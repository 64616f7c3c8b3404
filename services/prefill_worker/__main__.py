from libs.common.tasks import run_service
from services.prefill_worker.config import PrefillWorkerSettings
from services.prefill_worker.main import serve

if __name__ == "__main__":
    run_service("prefill_worker", PrefillWorkerSettings, serve)
