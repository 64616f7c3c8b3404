"""The engine interface and its adapters: vLLM and the simulator."""
