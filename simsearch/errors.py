"""The base of the errors that a caller of simsearch may want to catch by kind."""

from __future__ import annotations


class SimsearchError(Exception):
    """Something that simsearch was given cannot be used: an image, a catalog, a run, weights.

    Each kind is a subclass (CatalogError, ImageError, RunError, Untrusted, WeightsError, ...) whose message is one line
    that names the thing, the rule and what to do. A wrong argument is a plain ValueError.
    """
