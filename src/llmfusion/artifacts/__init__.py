"""Folders that can be trusted: the store, the job that writes one, its lease and its provenance."""
