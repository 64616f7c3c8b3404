"""What prefill and decode workers share: one engine, offered through sessions and plain calls."""
