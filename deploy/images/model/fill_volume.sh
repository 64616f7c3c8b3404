#!/bin/sh
# Sees to it that a volume has a model: fill_volume.sh FOLDER
#
# The default model is copied if it is not there, or is of an older making; the folder appears whole.
# A folder that somebody else has put there is left alone.
set -eu
folder=$1
if [ -e "$folder" ] && [ ! -e "$folder/.complete" ]; then
    if [ ! -e "$folder/tokenizer.json" ]; then
        echo "$folder is no Hugging Face folder: it has no tokenizer.json" >&2
        exit 1
    fi
    echo "$folder is there"
elif cmp -s /model/.complete "$folder/.complete"; then
    echo "$folder is there"
elif [ "$(basename "$folder")" != "$(cat /model.name)" ]; then
    echo "there is no $folder, and this image has only $(cat /model.name)" >&2
    exit 1
else
    rm -rf "$folder.incoming"
    cp -r /model "$folder.incoming"
    rm -rf "$folder"
    mv "$folder.incoming" "$folder"
    echo "$folder is made"
fi
