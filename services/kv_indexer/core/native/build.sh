#!/bin/sh
# Compiles the KV indexer's core into an environment: build.sh ENVIRONMENT [STAMP]
#
# Needs a C++ compiler (CXX, or g++) and Python's headers, and no packages. Without one of them nothing
# is built, and the indexer uses its core in Python.
set -eu
environment=$1 stamp=${2:-}
sources=$(dirname "$0")
compiler=${CXX:-g++}

# What to compile with, where to, and which sources these are.
eval "$("$environment/bin/python" - "$sources"/*.h "$sources"/*.cpp << 'END_OF_PYTHON'
import hashlib, pathlib, sys, sysconfig
print("headers=%r" % sysconfig.get_path("include"))
print("target=%r" % (sysconfig.get_path("platlib") + "/switchgear_block_index.so"))
print("checksum=" + hashlib.sha256(b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())
END_OF_PYTHON
)"

rm -f "$target" "$environment"/.block_index-*
if ! command -v "$compiler" > /dev/null; then
    echo "no C++ compiler '$compiler': the KV indexer will use its core in Python" >&2
elif [ ! -e "$headers/Python.h" ]; then
    echo "no $headers/Python.h: the KV indexer will use its core in Python" >&2
else
    echo "compiling the KV indexer's core into $environment"
    "$compiler" -std=c++20 -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden ${CXXFLAGS:-} \
        -DSWITCHGEAR_SOURCES="\"$checksum\"" -I"$headers" "$sources/module.cpp" -o "$target.new"
    mv "$target.new" "$target"
fi
[ -z "$stamp" ] || touch "$stamp"
