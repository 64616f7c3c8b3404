"""`python -m services.frontend`."""

from libs.common.tasks import run_service
from services.frontend.config import FrontendSettings
from services.frontend.main import serve

if __name__ == "__main__":
    run_service("frontend", FrontendSettings, serve)
