"""An engine without weights: real KV accounting and scheduling, pretended computing."""
