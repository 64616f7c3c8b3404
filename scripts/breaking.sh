#!/bin/sh
# Says whether the contracts in protos/ break clients of an earlier commit: scripts/breaking.sh [REVISION]
#
# Without a revision the previous commit counts, and having none is fine: the first commit, or a
# clone without history. A revision that is named must exist.
set -eu
cd "$(dirname "$0")/.."
revision=${1:-HEAD~1}
if ! git rev-parse --quiet --verify "$revision^{commit}" > /dev/null; then
    if [ $# -gt 0 ]; then
        echo "no commit $revision to compare protos/ with" >&2
        exit 2
    fi
    echo "protos/ not compared: there is no previous commit"
    exit 0
fi
earlier=$(mktemp -d)
trap 'rm -rf "$earlier"' EXIT
git archive "$revision" buf.yaml protos | tar -x -C "$earlier"
.venv/bin/buf breaking --against "$earlier"
