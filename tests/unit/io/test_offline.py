"""Asking is offline, whatever was imported before; importing what asks is not."""

import os
import subprocess
import sys

import pytest

ASKS = """
import huggingface_hub
from datasets import config
if huggingface_hub.constants.HF_HUB_OFFLINE:
    try:
        huggingface_hub.snapshot_download("a/b", revision="0" * 40)
    except Exception as error:
        print(error)
print(huggingface_hub.constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)
"""
OFFLINE = "from llmfusion.io.offline import go_offline; go_offline()"


@pytest.mark.parametrize(
    ("program", "is_offline"),
    [
        (f"{OFFLINE}\n{ASKS}", True),
        (f"import huggingface_hub, datasets\n{OFFLINE}\n{ASKS}", True),
        (
            f"import llmfusion.evaluation.answers\n{ASKS}",
            False,
        ),  # as `llmfusion warm` does, whose forks stage from the hub
    ],
)
def test_the_libraries_are_offline_from_then_on_and_not_before(tmp_path, program: str, is_offline: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{is_offline} {is_offline}", done.stderr
    assert ("outgoing traffic has been disabled" in done.stdout) == is_offline
