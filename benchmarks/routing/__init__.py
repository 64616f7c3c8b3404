"""How well requests are routed: recorded traces replayed on simulated workers, beside Dynamo."""
