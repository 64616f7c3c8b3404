"""The prefill worker: one engine that computes prompts for decode workers to pull."""
