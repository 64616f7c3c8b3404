"""Measurements of whole services and of their parts. Each folder runs by itself."""
