"""What two or more services share."""

import os

# The gRPC of these days has threads that do nothing but read sockets ("EventEngine"). Without them
# whoever waits for what comes reads it, as it always was in Python: a change of threads less for
# each message. Looked at when `grpc` is imported, which our services do after this package. Once
# gRPC can no longer do without, it logs that it does not know the names.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
