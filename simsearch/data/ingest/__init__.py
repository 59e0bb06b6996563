"""User-supplied collections made ready: read, cleaned, grouped into works, decoded."""
