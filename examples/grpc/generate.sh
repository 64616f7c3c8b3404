#!/bin/sh
# Streams an answer over gRPC: generate.sh HOST:PORT MODEL QUESTION [MAX_TOKENS]
set -eu
address=$1 model=$2 question=$3 max_tokens=${4:-32}
buf=$(command -v buf || echo "$(dirname "$0")/../../.venv/bin/buf")
quoted() { printf '%s' "$1" | sed 's/[\\"]/\\&/g'; }
printf '{"model": "%s", "messages": {"messages": [{"role": "user", "content": "%s"}]}, "stopping": {"max_tokens": %d}}' \
    "$(quoted "$model")" "$(quoted "$question")" "$max_tokens" |
    "$buf" curl --protocol grpc --http2-prior-knowledge --data @- \
        ${SWITCHGEAR_API_KEY:+--header "authorization: Bearer $SWITCHGEAR_API_KEY"} \
        "http://$address/switchgear.inference.v1.InferenceService/Generate"
