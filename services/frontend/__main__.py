"""`python -m services.frontend`, and `python -m services.frontend keys` for API keys."""

import sys

from libs.common.tasks import run_service
from services.frontend.config import FrontendSettings

if __name__ == "__main__":
    # Each loads only what it needs: what it takes to serve takes seconds to load.
    if sys.argv[1:2] == ["keys"]:
        from services.frontend import key_commands

        key_commands.app(sys.argv[2:], prog_name="python -m services.frontend keys")
    else:
        from services.frontend.main import serve

        run_service("frontend", FrontendSettings, serve)
