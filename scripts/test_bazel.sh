#!/bin/sh
# Builds everything with Bazel and runs the tests that need no servers. Run through `make test-bazel`.
#
# Uses the Bazel that is there. Where none is, installs Debian's, which with WORKSPACE needs nothing
# from the network.
set -eu
cd "$(dirname "$0")/.."

if ! command -v bazel > /dev/null; then
    echo "bazel is not installed; trying Debian's: apt-get install bazel-bootstrap"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends bazel-bootstrap bazel-rules-java bazel-rules-proto > /dev/null
fi

# The server goes by itself, should this script be killed.
run() { command=$1; shift; bazel --max_idle_secs=60 "$command" --noshow_progress "$@"; }
trap 'bazel shutdown' EXIT

run build //...

# Services meet only in protos: none of them may be visible to another.
services=$(bazel --max_idle_secs=60 query --noshow_progress 'filter(":service$", //services/...)')
for service in $services; do
    others=$(echo "$services" | grep -vx "$service" | tr '\n' ' ')
    seen=$(bazel --max_idle_secs=60 query --noshow_progress "visible($service, set($others))")
    if [ -n "$seen" ]; then
        echo "$service can see $seen" >&2
        exit 1
    fi
done

run test //...
