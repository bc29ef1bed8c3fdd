"""Layouts of datasets, one a file, named by the file. What a file declares: :mod:`llmfusion.data.layout`."""
