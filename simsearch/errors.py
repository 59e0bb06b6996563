"""The base class of errors that callers of simsearch may want to catch."""

from __future__ import annotations


class SimsearchError(Exception):
    """An input cannot be used: an image, a catalog, a run, weights.

    Each kind is a subclass (CatalogError, ImageError, RunError, Untrusted, WeightsError, ...). Its message is one line
    that names the object, the rule and what to do. A wrong argument raises a plain ValueError.
    """
