#!/bin/sh
# Makes a virtual environment from a lock file: scripts/env.sh DIRECTORY LOCK STAMP
#
# The lock names every package that belongs in the environment, so nothing is resolved (--no-deps)
# and nothing else gets in. The stamp is written last: a half-made environment is made again.
set -eu
directory=$1 lock=$2 stamp=$3
python=${PYTHON:-python3.11}
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "No interpreter '$python': install Python 3.11 or name one with PYTHON=/path/to/python3.11" >&2
    exit 1
}
if [ "$found" != 3.11 ]; then
    echo "Python 3.11 is needed, '$python' is $found: name another with PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# Without a terminal pip is silent while it downloads and unpacks.
if ! [ -t 1 ]; then
    began=$(date +%s)
    (
        while sleep "${PROGRESS_SECONDS:-15}" > /dev/null 2>&1 && kill -0 $$ 2> /dev/null; do
            echo "still making $directory ($(($(date +%s) - began)) s)"
        done
    ) &
    trap "kill $!" EXIT
fi

echo "making $directory from $lock ($(grep -c '==' "$lock") packages)"
"$python" -m venv --clear "$directory"
pip() { "$directory/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch's CPU build is not on PyPI. Where pip is not configured with a place for it, PyTorch's own
# index has it, and is asked for this one package only.
torch=$(sed -n 's/^\(torch==[^ ]*+cpu\).*/\1/p' "$lock")
if [ -n "$torch" ]; then
    pip install --no-deps "$torch" 2>/dev/null \
        || pip install --no-deps --extra-index-url "$torch_cpu_index" "$torch"
fi
pip install --no-deps -r "$lock"
touch "$stamp"
