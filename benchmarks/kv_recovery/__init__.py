"""How long the KV index is wrong after something broke, with real processes."""
