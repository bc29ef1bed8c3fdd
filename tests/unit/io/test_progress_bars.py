"""What loading and saving write into a log file."""

import subprocess
import sys

import pytest

LOAD_AND_SAVE = """
import sys
from pathlib import Path
from llmfusion.models.loading import load_model, load_tokenizer, save_model
from tests.unit.stand_ins import artifact
source = artifact(Path(sys.argv[1]))
save_model(load_model(source, "float32"), load_tokenizer(source, None), Path(sys.argv[2]), "float32")
"""
OTHERS = """
import datasets
from tqdm import tqdm
from tqdm.auto import trange
from llmfusion.io.progress_bars import show_only_in_terminals
show_only_in_terminals()
datasets.Dataset.from_dict({"a": [1, 2]}).map(lambda row: row)
for _ in tqdm(range(3), disable=False):
    pass
for _ in trange(3):
    pass
print("done")
"""
BARS = """
from tqdm import tqdm
for _ in tqdm(range(3), "a bar"):
    pass
"""


def log_of(program, *arguments):
    """What a job's log would hold: standard output and standard error of this program, in one file."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return done.stdout.decode()


def has_bars(log):
    return "\r" in log or "%|" in log


def test_loading_and_saving_a_model_writes_no_bars_into_a_log(tmp_path, pivot):
    log = log_of(LOAD_AND_SAVE, pivot.folder, tmp_path)
    assert not has_bars(log), log
    assert (tmp_path / "model.safetensors").exists()


def test_no_library_writes_bars_into_a_log_though_it_asks_for_them():
    log = log_of(OTHERS)
    assert not has_bars(log), log
    assert log.endswith("done\n")


def test_a_bar_that_nobody_switched_off_is_found():
    assert has_bars(log_of(BARS))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_has_its_bars(is_terminal, monkeypatch):
    import io

    from tqdm import tqdm

    from llmfusion.io.progress_bars import show_only_in_terminals

    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)  # as it was, afterwards
    show_only_in_terminals.__wrapped__()
    stream = Stream()
    for _ in tqdm(range(3), "a bar", file=stream):
        pass
    assert has_bars(stream.getvalue()) == is_terminal
