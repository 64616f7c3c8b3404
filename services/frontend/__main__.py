"""`python -m services.frontend`, and `python -m services.frontend keys` for API keys."""

import os
import sys

from libs.common.tasks import run_service
from services.frontend.config import FrontendSettings

THREAD_TURN_SECONDS = 0.001
"""How long a thread that tokenises keeps the event loop waiting: it has every token of every stream
to send. Python's own is 0.005."""

TOKENIZER_THREADS = ("TOKENIZERS_PARALLELISM", "false")
"""The tokenizers library would hand the parts of a text to threads of its own. For a few words that
takes four times as long as encoding them, and cores that have others' requests to serve."""

if __name__ == "__main__":
    # Each loads only what it needs: what it takes to serve takes seconds to load.
    if sys.argv[1:2] == ["keys"]:
        from services.frontend import key_commands

        key_commands.app(sys.argv[2:], prog_name="python -m services.frontend keys")
    else:
        from services.frontend.main import serve

        os.environ.setdefault(*TOKENIZER_THREADS)
        sys.setswitchinterval(THREAD_TURN_SECONDS)
        run_service("frontend", FrontendSettings, serve)
