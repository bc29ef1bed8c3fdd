"""Models: staging from hub, folder or GGUF, models trained from scratch, loading that trusts nothing unchecked."""
