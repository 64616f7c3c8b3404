#!/bin/sh
# Runs Envoy in a container: run_envoy.sh [ENVOY FLAG...]
#
# With /etc/envoy/tls/tls.crt and tls.key mounted it offers TLS on port 8443 beside plain text on 8000.
# With /etc/envoy/services/ca.crt mounted it calls frontends' gRPC with TLS.
# Told to stop, it lets the streams that run come to their end.
set -eu
python -m deploy.envoy.configuration --tls-folder /etc/envoy/tls \
    --services-ca /etc/envoy/services/ca.crt > /tmp/envoy.json
envoy --config-path /tmp/envoy.json --log-level "${ENVOY_LOG_LEVEL:-warning}" --drain-time-s 30 "$@" &
envoy=$!
trap 'python -m deploy.envoy.drain || true; kill -TERM $envoy' TERM INT
status=0
wait $envoy || status=$?
# A trap ends the wait above before Envoy has ended.
if kill -0 $envoy 2> /dev/null; then
    status=0
    wait $envoy || status=$?
fi
exit $status
