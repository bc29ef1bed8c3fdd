"""What a GPU can do at most: the denominator of model FLOPs utilisation (MFU)."""

import re

PEAKS = {  # FLOP/s in bfloat16, dense, by a word of the device's name (makers' data sheets)
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A800": 312e12,
    "4090": 165e12,
    "A40": 150e12,
    "A10": 125e12,
    "L4": 121e12,
    "3090": 71e12,
}
PEAK_H100_PCIE = 756e12


def peak_of(device: str) -> float | None:
    """FLOP/s of a GPU by its name, e.g. ``NVIDIA H100 80GB HBM3``; None for one that is not listed."""
    words = re.split(r"[ -]", device)
    if "H100" in words and "PCIe" in words:
        return PEAK_H100_PCIE
    return next((peak for name, peak in PEAKS.items() if name in words), None)
