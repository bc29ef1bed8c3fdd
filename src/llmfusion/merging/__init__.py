"""Merging: pure functions on arrays, and an engine that streams checkpoints through them. Imports no torch."""
