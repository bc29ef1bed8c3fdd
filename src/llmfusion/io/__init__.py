"""Readers and writers that every room needs: safetensors without torch, JSON, files written at once or not at all."""
