"""vLLM's own embeddings, as anybody would make them, for comparison. Run by an interpreter that has
vLLM.

Reads {"model", "prompts": [text], "dimensions": [length or null]} from stdin; the last line of
stdout is, for each of the lengths, the list of vectors.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, PoolingParams

    task = json.load(sys.stdin)
    llm = LLM(
        model=task["model"],
        runner="pooling",
        convert="embed",
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    found = []
    for dimensions in task["dimensions"]:
        params = PoolingParams(dimensions=dimensions)
        outputs = llm.embed(task["prompts"], pooling_params=params, use_tqdm=False)
        found.append([list(output.outputs.embedding) for output in outputs])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
