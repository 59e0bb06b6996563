"""Catalogs, the search engine, filters, re-ranking and calibration."""
