#!/bin/sh
# Makes sure that there is a Prometheus for `make pictures`: the installed one, or else Debian's or Ubuntu's
# package, unpacked into build/prometheus. Nothing is installed and no service starts, so it needs no root.
set -eu
cd "$(dirname "$0")/.."
command -v prometheus > /dev/null && exit 0
[ -x build/prometheus/usr/bin/prometheus ] && exit 0
echo "prometheus is not installed; trying: apt-get download prometheus"
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
if (cd "$fetched" && apt-get download prometheus > log 2>&1) && dpkg -x "$fetched"/prometheus_*.deb build/prometheus; then
    exit 0
fi
cat "$fetched/log" >&2
echo "prometheus cannot be fetched from here (no apt, or no package index; apt-get update may help)." >&2
echo "Install it by hand: sudo apt-get install prometheus (or see https://prometheus.io/download)" >&2
exit 1
