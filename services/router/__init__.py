"""The router: picks the workers for each leg of a request and relays their tokens."""
