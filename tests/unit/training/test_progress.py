import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from llmfusion.training import progress as module
from llmfusion.training.peaks import peak_of
from llmfusion.training.progress import ProgressMeter


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    return now


def steps(meter, clock, first, last, seconds, tokens=1000, padded=250):
    for step in range(first, last + 1):
        with meter.step(tokens, padded):
            clock.seconds += seconds
        meter.report(step, 1.5, 1e-6)


def test_times_are_those_of_the_steps_since_the_last_call(clock):
    meter = ProgressMeter(100, 10)
    meter.begin(0)
    steps(meter, clock, 1, 4, 0.5)
    clock.seconds += 60  # a save is no step
    assert meter.timing(4) == {"step": 4, "seconds": 2.0, "tokens_per_second": 2000.0, "padding": 0.2}
    steps(meter, clock, 5, 5, 0.25)
    assert meter.timing(5)["tokens_per_second"] == 4000.0


def test_on_a_gpu_mfu_is_six_flops_a_parameter_and_token_of_the_peak(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    meter = ProgressMeter(10, 8 * 10**9)
    meter.begin(0)
    steps(meter, clock, 1, 1, 1.0, tokens=8000)
    assert meter.timing(1)["mfu"] == pytest.approx(6 * 8e9 * 8000 / 989e12, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some Card", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(name, peak):
    assert peak_of(name) == peak


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO)
    meter = ProgressMeter(200, 10)
    meter.begin(0)
    steps(meter, clock, 1, 200, 1.0)
    lines = caplog.messages
    assert lines[0] == "step 1/200 loss 1.5000 lr 1e-06, 1,000 tokens/s, 3 min left"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 31, 61, 91, 121, 151, 181, 200]
    assert lines[-1].endswith("0 s left")


def test_a_terminal_gets_a_bar_and_no_lines(clock, capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    meter = ProgressMeter(20, 10)
    meter.begin(5)
    steps(meter, clock, 6, 20, 1.0)
    meter.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert caplog.messages == []
    assert "20/20" in shown.err
    assert "loss 1.5000 lr 1e-06, 1,000 tokens/s" in shown.err


def test_only_the_first_process_reports(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "rank", lambda: 1)
    meter = ProgressMeter(1, 10)
    meter.begin(0)
    steps(meter, clock, 1, 1, 1.0)
    assert caplog.messages == []
