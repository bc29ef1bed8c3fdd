# PYTHON_ARGCOMPLETE_OK
"""``python -m llmfusion``: the same as ``llmfusion``, also out of a clone that is not installed."""

from llmfusion.cli.main import entry

if __name__ == "__main__":
    entry()
