"""The HTTP API, the encoder's worker thread, and the web page."""
