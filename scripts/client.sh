#!/bin/sh
# Builds the wheel that other teams install, switchgear-client, into build/dist. After `make proto`.
#
# In it: clients/python, and of the generated code what that imports.
set -eu
cd "$(dirname "$0")/.."
generated=build/proto/switchgear
[ -d "$generated/inference" ] || { echo "no generated code: run make proto first" >&2; exit 1; }
mkdir -p build/dist
staged=$(mktemp -d build/client.XXXXXX)
trap 'rm -rf "$staged"' EXIT
cp -R clients/python/. "$staged"
mkdir "$staged/switchgear"
cp "$generated/__init__.py" "$generated/py.typed" "$staged/switchgear"
cp -R "$generated/common" "$generated/inference" "$staged/switchgear"
rm -f build/dist/switchgear_client-*.whl
.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir build/dist "$staged"
ls build/dist/switchgear_client-*.whl
