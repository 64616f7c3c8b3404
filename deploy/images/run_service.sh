#!/bin/sh
# Runs a service in a container: run_service.sh COMPONENT [FLAG...]
#
# Others must be told an address that leads here, so the container's own is published, and its
# host name tells replicas apart. SWITCHGEAR_<COMPONENT>_ADVERTISE_HOST and _NAME say otherwise.
set -eu
component=$1
shift
prefix=SWITCHGEAR_$(echo "$component" | tr '[:lower:]' '[:upper:]')
address=$(printenv "${prefix}_ADVERTISE_HOST" || hostname -i | cut -d ' ' -f 1)
name=$(printenv "${prefix}_NAME" || echo "$component-$(hostname)")
exec python -m "services.$component" --advertise-host "$address" --name "$name" "$@"
