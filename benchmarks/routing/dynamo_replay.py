"""Dynamo's own offline replay of a trace, with its mocker's defaults. Runs in .venv-dynamo, as
`python -m benchmarks.routing.dynamo_replay`, and prints one JSON object."""

import json
import sys


def main() -> None:
    # Only that environment has it.
    from dynamo._core import run_mocker_trace_replay

    wanted = json.loads(sys.argv[1])
    result = run_mocker_trace_replay(
        [wanted["trace"]],
        {"engine": {"block_size": wanted["block_size_tokens"]}},
        num_workers=wanted["workers"],
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
    ]
    print(json.dumps({"met_goal": result.summary["goodput_completed_requests"], "of": requests}))


if __name__ == "__main__":
    main()
