from libs.common.tasks import run_service
from services.decode_worker.config import DecodeWorkerSettings
from services.decode_worker.main import serve

if __name__ == "__main__":
    run_service("decode_worker", DecodeWorkerSettings, serve)
