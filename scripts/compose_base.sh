#!/bin/sh
# Makes sure that there is a base image to build ours from, and prints its name: scripts/compose_base.sh [LOCK...]
#
# Where the official image can be had, that is all. Elsewhere one is made for tests, from Debian's packages,
# with the wheels of requirements/services.txt (and further LOCKs) inside, so that builds in containers need
# no network and nothing of how this machine reaches its packages.
set -eu
cd "$(dirname "$0")/.."
official=python:3.11-slim-bookworm
python=$PWD/.venv/bin/python

say() { echo "$*" >&2; }

# An image of that name that was imported from a tar file has no history of being built as the official one.
if docker image inspect --format '{{join .Config.Cmd " "}}' "$official" 2> /dev/null | grep -q python; then
    echo "$official"
    exit 0
fi
if timeout "${PULL_SECONDS:-120}" docker pull -q "$official" > /dev/null 2>&1; then
    echo "$official"
    exit 0
fi

say "$official cannot be pulled: making a base for tests"
mkdir -p build/compose/wanted
rm -f build/compose/wanted/*
# Each list by itself: an engine's lock may have another version of a tool.
for lock in requirements/services.txt "$@"; do
    grep -Eo '^[a-z0-9._-]+==[^ ]+' "$lock" > "build/compose/wanted/$(basename "$lock")"
done
{
    grep -Eo '^[a-z0-9._-]+==[^ ]+' deploy/envoy/requirements.in
    grep -E '^(grpcio-tools|setuptools)==' requirements/dev.txt
    sed -n 's/^_REQUIREMENT = "\(.*\)"$/\1/p' deploy/local/default_model.py
} > build/compose/wanted/tools.txt
plain=switchgear-test-debian:bookworm-cxx
name=switchgear-test-base:$({ echo "$plain"; cat build/compose/wanted/*; } | cksum | cut -d ' ' -f 1)
if docker image inspect "$name" > /dev/null 2>&1; then
    echo "$name"
    exit 0
fi

say "collecting wheels with pip as it is set up here"
wheels=build/compose/context/wheels
rm -rf build/compose/context
mkdir -p "$wheels"
for list in build/compose/wanted/*; do
    "$python" -m pip wheel -qq --no-deps --wheel-dir "$wheels" -r "$list" >&2
done

if ! docker image inspect "$plain" > /dev/null 2>&1; then
    command -v mmdebstrap > /dev/null || apt-get install -y -qq mmdebstrap > /dev/null 2>&1 \
        || { say "mmdebstrap is needed and cannot be installed: apt-get install mmdebstrap"; exit 1; }
    say "making Debian bookworm with Python 3.11 and g++"
    mmdebstrap --quiet --variant=minbase \
        --include=python3,python3-venv,python3-pip,python3-dev,g++,ca-certificates,hostname,libnuma1 \
        bookworm build/compose/base.tar >&2
    docker import build/compose/base.tar "$plain" > /dev/null
    rm build/compose/base.tar
fi
cat > build/compose/context/Dockerfile << END
FROM $plain
RUN ln -s python3 /usr/bin/python && rm -f /usr/lib/python3.*/EXTERNALLY-MANAGED
COPY wheels /opt/wheels
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/opt/wheels PIP_DISABLE_PIP_VERSION_CHECK=1
CMD ["python3"]
END
docker build --quiet --tag "$name" build/compose/context > /dev/null
echo "$name"
