"""OpenAI's REST API."""
