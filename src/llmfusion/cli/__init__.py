"""Subcommands of ``llmfusion``, one module each."""
