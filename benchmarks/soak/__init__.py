"""Many requests of all kinds, and what is left of them afterwards."""
