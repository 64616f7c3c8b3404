"""The decode worker: one engine that generates, from pulled KV or from prompts of its own."""
