#!/bin/sh
# Generates the Python package `switchgear` from ./protos into DIRECTORY, without types:
# generate_protos.sh DIRECTORY
set -eu
into=$1
site_packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$into"
# site-packages holds google/rpc/*.proto, which errors are described with.
find protos -name '*.proto' -exec python3 -m grpc_tools.protoc -I protos -I "$site_packages" \
    --python_out="$into" --grpc_python_out="$into" {} +
find "$into/switchgear" -type d -exec touch {}/__init__.py \;
