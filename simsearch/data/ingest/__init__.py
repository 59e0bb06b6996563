"""Ingest of user-supplied collections: read, decode, clean, group into works, report."""
