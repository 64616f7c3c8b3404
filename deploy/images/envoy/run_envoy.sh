#!/bin/sh
# Runs Envoy in a container: run_envoy.sh [ENVOY FLAG...]
#
# With /etc/envoy/tls/tls.crt and tls.key mounted it offers TLS on port 8443 beside plain text on 8000.
set -eu
python -m deploy.envoy.configuration --tls-folder /etc/envoy/tls > /tmp/envoy.json
exec envoy --config-path /tmp/envoy.json --log-level "${ENVOY_LOG_LEVEL:-warning}" "$@"
