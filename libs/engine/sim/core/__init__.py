"""The simulator without I/O, clock or randomness: time passes as an argument."""
