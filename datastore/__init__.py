"""Room datastore."""
