"""`python -m services.frontend`, and `python -m services.frontend keys` for API keys."""

import sys

from libs.common.tasks import run_service
from services.frontend import key_commands
from services.frontend.config import FrontendSettings
from services.frontend.main import serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["keys"]:
        key_commands.app(sys.argv[2:], prog_name="python -m services.frontend keys")
    else:
        run_service("frontend", FrontendSettings, serve)
