"""No network for a step that has everything on disk, whether or not its libraries are loaded already."""

import os
import sys

# what the libraries read when they are imported, and what they keep then
VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")
CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("evaluate.config", "HF_EVALUATE_OFFLINE"),
)


def go_offline() -> None:
    """From now on no Hugging Face library of this process, or of those it starts, asks the hub for anything."""
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    for module, name in CONSTANTS:
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
