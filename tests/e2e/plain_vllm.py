"""vLLM as anybody would use it, for comparison. Run by an interpreter that has vLLM.

Reads {"model", "prompts": [[token id]], "max_tokens"} from stdin; the last line of stdout is the
list of outputs, as token ids.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    llm = LLM(
        model=task["model"],
        dtype="float32",
        block_size=32,
        max_model_len=2048,
        enforce_eager=True,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in task["prompts"]],
        SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True),
        use_tqdm=False,
    )
    print(json.dumps([list(result.outputs[0].token_ids) for result in results]))


if __name__ == "__main__":
    main()
