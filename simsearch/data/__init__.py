"""Collections, protocols, samplers and DataModules; ingest, the rendered sample, the audit of near-duplicates."""
