"""The index and how it follows a worker. No I/O, clock or logging in here."""
