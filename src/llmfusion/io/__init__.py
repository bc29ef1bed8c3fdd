"""Readers and writers that every room needs: safetensors without torch, JSON, files that are there whole or not at all."""
