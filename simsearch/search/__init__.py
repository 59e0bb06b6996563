"""Catalogs, the engine that answers queries, filters, re-ranking and calibration."""
