"""Pure logic: no I/O, clock, logging or randomness."""
