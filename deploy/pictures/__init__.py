"""Pictures of a real run: its dashboards, drawn from their own queries, and one request's trace."""
