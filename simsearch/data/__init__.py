"""Collections, protocols, samplers and DataModules; manifests, benchmark formats and the audit of near-duplicates."""
