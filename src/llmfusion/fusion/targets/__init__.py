"""Fusion targets: one file each, named like the target. See :mod:`llmfusion.fusion.target`."""
