"""Fuse several large language models into one pivot, as a Snakemake workflow."""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parents[2]  # the clone: paths in a study are relative to it
