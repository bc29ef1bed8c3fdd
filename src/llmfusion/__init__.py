"""Fuse several large language models into one pivot, as a Snakemake workflow."""

__version__ = "0.1.0"
