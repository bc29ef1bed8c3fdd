"""What this machine can do, for estimates of studies that expect no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from llmfusion.study.scales import SCALES
from llmfusion.study.workload import Assumptions

# a product of two matrices, in a process of its own: the number of threads is chosen when numpy is imported
PRODUCT = """
import time
import numpy
size = 768
left = numpy.ones((size, size), numpy.float32)
left @ left
times = []
for _ in range(5):
    start = time.perf_counter()
    left @ left
    times.append(time.perf_counter() - start)
print(2 * size**3 / min(times))
"""
GPU_DRIVER = Path("/proc/driver/nvidia")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def assumptions_for(scale: str) -> Assumptions:
    """What an estimate of a study of this scale assumes: one of the paper's GPUs, or without any GPU this machine."""
    if SCALES[scale].expects_gpu or GPU_DRIVER.exists():
        return Assumptions()
    return on_a_core(core_speed())


def on_a_core(speed: float) -> Assumptions:
    """Assumptions for jobs that have one core of so many FLOP/s each, as Snakemake gives them."""
    return replace(
        Assumptions(),
        peak=speed,
        uses_gpus=False,
        mfu=0.45,
        decoding=speed / 20,  # a batch goes on until its longest answer has ended
        gpu_memory=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        scheduling=3.0,
    )


def core_speed() -> float:
    """FLOP/s of one core of this machine in float32, measured in a tenth of a second."""
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)
