"""Room fusefs."""
