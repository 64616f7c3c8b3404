#!/bin/sh
# Generates the Python package `switchgear` from protos/ into build/proto. Run through `make proto`.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
site_packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p build
new=$(mktemp -d build/proto.XXXXXX)
trap 'rm -rf "$new"' EXIT
# site-packages holds google/rpc/*.proto, which errors are described with.
find protos -name '*.proto' -exec python -m grpc_tools.protoc -I protos -I "$site_packages" \
    --python_out="$new" --grpc_python_out="$new" --mypy_out="quiet:$new" --mypy_grpc_out="quiet:$new" {} +
find "$new/switchgear" -type d -exec touch {}/__init__.py \;
touch "$new/switchgear/py.typed"
rm -rf build/proto
mv "$new" build/proto
