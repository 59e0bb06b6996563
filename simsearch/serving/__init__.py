"""The HTTP API, the encoder's worker, and the page."""
