#!/bin/sh
# Makes sure that wrk, the load generator of `make bench`, is installed. Debian and Ubuntu have it.
command -v wrk > /dev/null && exit 0
echo "wrk is not installed; trying: apt-get install wrk"
if apt-get install -y wrk > /dev/null 2>&1 && command -v wrk > /dev/null; then
    exit 0
fi
echo "wrk cannot be installed from here (no root, or no package index). Install it by hand:" >&2
echo "  sudo apt-get install wrk     (or see https://github.com/wg/wrk)" >&2
exit 1
