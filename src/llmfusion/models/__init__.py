"""Models: staging from hub, folder or GGUF, training from scratch, and loading that trusts nothing it has not checked."""
