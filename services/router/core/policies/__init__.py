"""Policies by name: how the worker of one leg is chosen among those that can serve it. Pure."""

KV = "kv"
"""By the cost in services/router/core/decision.py: what a worker holds, and how busy it is."""

POLICIES = frozenset({KV})
"""Every name that a setting or a request can give."""
