"""Accepts requests of people and programs, and keeps them alive until they are answered."""
