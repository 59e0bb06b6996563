"""The error of catalogs."""

from __future__ import annotations

from simsearch.errors import SimsearchError


class CatalogError(SimsearchError, ValueError):
    """The folder is not a catalog, the catalog is damaged, or the encoder is not the catalog's own."""
