from libs.common.tasks import run_service
from services.router.config import RouterSettings
from services.router.main import serve

run_service("router", RouterSettings, serve)
