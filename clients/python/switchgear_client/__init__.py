"""Calls Switchgear over gRPC."""

from switchgear_client.client import Answer, Client, Prompt, reason_of, retry_after_seconds

__all__ = ["Answer", "Client", "Prompt", "reason_of", "retry_after_seconds"]
