"""Dynamo's own offline replay of a trace, with its mocker's defaults. Runs in .venv-dynamo, as
`python -m benchmarks.routing.dynamo_replay`, and prints one JSON object."""

import json
import sys


def main() -> None:
    # Only that environment has it.
    from dynamo._core import run_mocker_trace_replay

    wanted = json.loads(sys.argv[1])
    engine = {"block_size": wanted["block_size_tokens"]}
    workers = (
        {
            "prefill_engine_args": {"engine": engine | {"worker_type": "prefill"}},
            "decode_engine_args": {"engine": engine | {"worker_type": "decode"}},
            "num_prefill_workers": wanted["prefill_workers"],
            "num_decode_workers": wanted["workers"],
        }
        if wanted["prefill_workers"]
        else {"extra_engine_args": {"engine": engine}, "num_workers": wanted["workers"]}
    )
    result = run_mocker_trace_replay(
        [wanted["trace"]],
        **workers,
        router_mode=wanted["router_mode"],
        trace_block_size=wanted["trace_block_tokens"],
        arrival_speedup_ratio=wanted["speed_up"],
        sla_ttft_ms=wanted["ttft_goal_ms"],
        sla_itl_ms=wanted["itl_goal_ms"],
        capture_per_request=True,
    )
    requests = [
        {
            "prompt_tokens": one["input_length"],
            "cached_tokens": one["reused_input_tokens"],
            "ttft_seconds": one["ttft_ms"] / 1_000,
            "itl_seconds": None if one["output_length"] < 2 else one["itl_ms"] / 1_000,
        }
        for one in result.per_request
        if one["terminal_status"] == "completed"
    ]
    summary = result.summary
    told = {
        "met_goal": summary["goodput_completed_requests"],
        "refused": summary["num_requests"] - len(requests),
        "of": requests,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
