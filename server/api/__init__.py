"""The REST interface (spec 6), one module per part of it."""
