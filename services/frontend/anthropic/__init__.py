"""Anthropic's Messages API, on top of what answers OpenAI's."""
