"""Room repository."""
