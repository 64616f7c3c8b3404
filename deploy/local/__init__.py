"""A whole deployment as plain processes on one machine."""
