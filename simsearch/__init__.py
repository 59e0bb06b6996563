"""simsearch: similar-image search, from an experiment to an engine."""

__version__ = "0.2.0"
