"""One small interface to FAISS. Only this package imports it."""
