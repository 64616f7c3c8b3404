from libs.common.tasks import run_service
from services.router.config import RouterSettings
from services.router.main import serve

if __name__ == "__main__":
    run_service("router", RouterSettings, serve)
