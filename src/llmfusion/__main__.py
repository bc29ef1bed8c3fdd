# PYTHON_ARGCOMPLETE_OK
"""``python -m llmfusion``: the same as ``llmfusion``, also out of a clone that is not installed."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; main() answers it then
    from llmfusion.cli.main import entry

    entry()
