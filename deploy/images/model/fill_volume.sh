#!/bin/sh
# Copies this image's model into a volume: fill_volume.sh FOLDER
#
# What is there already is left alone, unless it is of another making. The folder appears whole.
set -eu
folder=$1
if cmp -s /model/.complete "$folder/.complete"; then
    echo "$folder is there"
    exit 0
fi
incoming=$folder.incoming
rm -rf "$incoming"
cp -r /model "$incoming"
rm -rf "$folder"
mv "$incoming" "$folder"
echo "$folder is made"
