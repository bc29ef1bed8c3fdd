"""Progress bars belong on a terminal: in a log file each is a line full of carriage returns."""

import sys
from functools import cache, wraps
from typing import Any


@cache
def show_only_in_terminals() -> None:
    """From now on no library of this process draws a progress bar into a file or a pipe.

    transformers, datasets, huggingface_hub, gguf and lm-eval all draw with tqdm; some of them have no switch for it,
    so tqdm itself is told. Where a bar would be written is looked up when it begins, for a process whose output is
    redirected.
    """
    from tqdm import tqdm

    create = tqdm.__init__

    @wraps(create)
    def create_in_terminals(self: Any, *args: Any, **options: Any) -> None:
        stream = options.get("file") or sys.stderr
        if not getattr(stream, "isatty", bool)():
            options["disable"] = True
        create(self, *args, **options)

    tqdm.__init__ = create_in_terminals
